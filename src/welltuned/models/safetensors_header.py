"""The header of a safetensors file, read as strictly as the format is written; no tensor is touched.

Eight bytes of length, JSON, then the tensors' bytes without gap or overlap (github.com/huggingface/safetensors).
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from welltuned.errors import InputError

LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
METADATA = "__metadata__"
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}
_BITS |= {"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32}
_BITS |= {"U64": 64, "I64": 64, "F64": 64, "C64": 64}


class _Fault(ValueError):
    """What is wrong with a header, in words."""


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor by name.

    Raises:
        InputError: the file is cut short, or its header is not what the format allows.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > LONGEST_HEADER and 8 + length <= size:
                raise _Fault(f"the header claims {length:,} bytes")
            if 8 + length > size:
                raise InputError("the weight file is cut short", where=str(path), mend="download it again")
            text = file.read(length)
        return _checked(_parsed(text), size - 8 - length, path)
    except OSError as error:
        raise InputError(f"the weight file cannot be read ({error.strerror})", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, _Fault) else "its header is not JSON"
        raise InputError(f"not a safetensors file: {why}", where=str(path), mend="download it again") from error


def _parsed(text: bytes) -> Mapping[str, Any]:
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    if not isinstance(header, dict):
        raise _Fault("its header is no JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Fault(f"{twice[:80]!r} stands in it twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise _Fault(f"it holds {text}")


def _checked(header: Mapping[str, Any], room: int, path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors, once their places are known to fill the file's `room` bytes without gap or overlap."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == METADATA:
            continue
        dtype, shape, begin, end = _entry(name, entry)
        found[name] = (dtype.lower(), shape)
        places.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(places):
        if begin != at:
            raise _Fault(f"the bytes of {name[:80]!r} overlap others or leave a gap")
        at = end
    if at > room:
        raise InputError("the weight file is cut short", where=str(path), mend="download it again")
    if at < room:
        raise _Fault(f"{room - at:,} of its bytes belong to no tensor")
    return found


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    shown = f"the entry of {name[:80]!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Fault(f"{shown} has other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _Fault(f"{shown} holds something else than sizes")
    begin, end = offsets
    bits = _BITS.get(dtype)
    if bits is None:
        raise _Fault(f"{shown} has the unknown type {dtype[:20]!r}")
    if (end - begin) * 8 != math.prod(shape) * bits:
        raise _Fault(f"{shown} has {end - begin:,} bytes, and its shape needs {math.prod(shape) * bits // 8:,}")
    return dtype, tuple(shape), begin, end


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)
