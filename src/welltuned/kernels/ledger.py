"""What a micro-batch's rows are, as one short tensor: the only form in which a compiled layer can be given it.

Numbers in Python would be part of the compiled code, which would then be compiled anew for every micro-batch.
"""

import struct
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from welltuned.kernels.attention import Branches
from welltuned.kernels.lora import Dropout, Rows

_BITS = 0xFFFFFFFFFFFFFFFF


def _tensor(numbers: Iterable[int]) -> Tensor:
    return torch.tensor([n - 2**64 if n >= 2**63 else n for n in (m & _BITS for m in numbers)], dtype=torch.int64)


def _of_float(x: float) -> int:
    """The bits of a double."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


def _to_float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def ledger_of(rows: Rows) -> Tensor:
    """[p, adapters or -1, rows of each, examples that drop, (rows, key, p) of each]; keys modulo 2^64, as masks are."""
    drop, counts = rows.dropout, rows.per_adapter
    spans = drop.spans if drop.p else ()
    shares = drop.p_of_span or (drop.p,) * len(spans)
    head = [_of_float(drop.p), -1 if counts is None else len(counts), *(counts or ()), len(spans)]
    return _tensor([*head, *(n for (m, key), p in zip(spans, shares, strict=True) for n in (m, key, _of_float(p)))])


def rows_of(ledger: Tensor) -> Rows:
    """The same rows again."""
    bits, adapters, *rest = ledger.tolist()
    counts = None if adapters < 0 else tuple(rest[:adapters])
    examples, *spans = rest[max(0, adapters) :]
    if not examples:
        return Rows(counts, Dropout(_to_float(bits)) if not bits else Dropout())
    pairs = tuple((spans[3 * i], spans[3 * i + 1]) for i in range(examples))
    shares = tuple(_to_float(spans[3 * i + 2]) for i in range(examples))
    return Rows(counts, Dropout(_to_float(bits), pairs, shares))


def layout_of(lengths: Sequence[int], branches: Branches | None) -> Tensor:
    """[examples, tokens of each, then of each the number of its branches and their rows]."""
    parts = branches or [()] * len(lengths)
    return _tensor([len(lengths), *lengths, *(n for rows in parts for n in (len(rows), *rows))])


def layout(ledger: Tensor) -> tuple[list[int], list[tuple[int, ...]]]:
    """Lengths and branches again."""
    count, *rest = ledger.tolist()
    lengths, rest = rest[:count], rest[count:]
    branches = []
    for _ in lengths:
        n = rest[0]
        branches.append(tuple(rest[1 : 1 + n]))
        rest = rest[1 + n :]
    return lengths, branches
