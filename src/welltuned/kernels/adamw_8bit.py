"""AdamW whose two moments are kept in 8 bits, block by block: Dettmers et al. 2022, arXiv 2110.02861.

256 numbers at a time are their largest magnitude in fp32 and a code each. The codes are the paper's dynamic map: seven
decades, the higher ones cut finer; signed for the first moment, unsigned for the second. An update expands a piece of
both, is AdamW in fp32 on it, and codes it again, in room that is made once: so it cannot run out of memory half done.

In one thing this is not bitsandbytes': a second moment above zero never gets the code of zero. Nearest rounding gives
it to all below 1.6e-7 of their block's largest, whose update is then divided by the newest gradient alone: 1/sqrt(1 -
beta2) = 32 times too long, for good (Li et al. 2023, arXiv 2309.01507, found the same at 4 bits). Nor is bitsandbytes'
own update used. On a CPU (0.50.2) it codes by a table of 65,536 equal steps, by which all within 3e-5 of zero, and zero
itself, becomes one number, 2.1e-5 of the block's largest: weights without a gradient move.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK = 256
CHUNK = {"cpu": 2**20, "cuda": 2**23}  # numbers at a time: few enough for a cache, enough for a launch


@cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values, ascending, of magnitudes up to 1.

    A decade [10^(i-7), 10^(i-6)] of i = 0..6 is cut into 2^i equal parts (2^(i+1) without a sign), of which the
    middles are taken; then 0 and 1.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (i + (not signed)) + 1)
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def edges_of(signed: bool) -> Tensor:
    """[255] between neighbouring values, ascending: the code of x is the number of edges below it."""
    values = dynamic_map(signed)
    edges = (values[:-1] + values[1:]) / 2
    if not signed:
        edges[0] = 0.0  # what is above zero is not zero
    return edges


CELL = 15  # low bits of an fp32 number that its cell leaves out: sign, exponent and 8 bits of the fraction are left
CELLS = 2 ** (32 - CELL)


@dataclass(frozen=True, slots=True)
class Tables:
    """By which numbers are expanded and coded.

    A cell is narrow enough to hold one edge at most, so a code is a look-up and a comparison, where a search of the
    edges takes ten times as long on a CPU.

    Attributes:
        values: [256] by code. first_C, edge_C: of each cell its smallest code, and the edge to the next one.
    """

    values: Tensor
    first_C: Tensor
    edge_C: Tensor


@cache
def tables(signed: bool, device: torch.device) -> Tables:
    edges = edges_of(signed)
    start_C = torch.arange(-CELLS // 2, CELLS // 2, dtype=torch.int32) << CELL
    ends = [bits.view(torch.float32).nan_to_num(0.0, 0.0, 0.0) for bits in (start_C, start_C + (2**CELL - 1))]
    codes = [torch.bucketize(end, edges) for end in ends]
    first_C, last_C = torch.minimum(*codes), torch.maximum(*codes)
    assert int((last_C - first_C).max()) <= 1
    edge_C = torch.cat([edges, torch.tensor([torch.inf])])[first_C]
    return Tables(*(t.to(device) for t in (dynamic_map(signed), first_C.to(torch.uint8), edge_C)))


def blocks_of(numbers: int) -> int:
    """How many blocks hold so many numbers, the last one perhaps in part."""
    return -(-numbers // BLOCK)


@dataclass(frozen=True, slots=True)
class Moment:
    """n numbers in 8 bits.

    Attributes:
        codes_n: uint8. largest_B: fp32, of each block.
    """

    codes_n: Tensor
    largest_B: Tensor
    signed: bool

    def clear(self) -> None:
        """All numbers zero."""
        self.codes_n.fill_(int(torch.searchsorted(dynamic_map(self.signed), 0.0)))
        self.largest_B.zero_()

    def expanded(self) -> Tensor:
        """The n numbers in fp32: the plain reference of what an update expands."""
        values = tables(self.signed, self.codes_n.device).values
        each_n = self.largest_B.repeat_interleave(BLOCK)[: self.codes_n.numel()]
        return values[self.codes_n.long()] * each_n


def coded_reference(x_n: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes, largest of each block) of fp32 numbers: the nearest value of the map, the lower one of two as near."""
    values = dynamic_map(signed).to(x_n.device)
    padded_BW = torch.nn.functional.pad(x_n, (0, -x_n.numel() % BLOCK)).view(-1, BLOCK)
    largest_B = padded_BW.abs().amax(1)
    scaled = (padded_BW * largest_B.clamp_min(torch.finfo(torch.float32).tiny).reciprocal()[:, None]).view(-1)
    codes = torch.cat([(part[:, None] - values).abs().argmin(1) for part in scaled.split(4096)])
    if not signed:
        codes = torch.where(scaled > 0, codes.clamp_min(1), codes)
    return codes[: x_n.numel()].to(torch.uint8), largest_B


@dataclass(frozen=True, slots=True)
class Workspace:
    """Room for one piece of an update; enough for `numbers` at a time."""

    m_n: Tensor
    v_n: Tensor
    work_n: Tensor
    index_n: Tensor
    inverse_B: Tensor

    @classmethod
    def of(cls, numbers: int, device: torch.device) -> "Workspace":
        size = min(CHUNK[device.type], blocks_of(numbers) * BLOCK)
        m_n, v_n, work_n = (torch.empty(size, device=device) for _ in range(3))
        index_n = torch.empty(size, dtype=torch.int32, device=device)
        return cls(m_n, v_n, work_n, index_n, torch.empty(blocks_of(size), device=device))

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.m_n, self.v_n, self.work_n, self.index_n, self.inverse_B))


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """AdamW's numbers for one update; `step` counts from 1."""

    rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


def adamw_8bit_(p_n: Tensor, g_n: Tensor, m: Moment, v: Moment, at: Update, room: Workspace) -> None:
    """One update of fp32 weights and of both moments, in place.

    Args:
        g_n: the gradient, finite: a NaN would become its whole block's.
    """
    for numbers, blocks in _pieces(p_n.numel(), room.m_n.numel()):
        g, size = g_n[numbers], numbers.stop - numbers.start
        m_n, v_n, work_n = room.m_n[:size], room.v_n[:size], room.work_n[:size]
        _expand(m, numbers, blocks, m_n, room.index_n)
        _expand(v, numbers, blocks, v_n, room.index_n)
        m_n.lerp_(g, 1 - at.beta1)
        v_n.mul_(at.beta2).addcmul_(g, g, value=1 - at.beta2)
        torch.sqrt(v_n, out=work_n).div_((1 - at.beta2**at.step) ** 0.5).add_(at.eps)
        p = p_n[numbers].mul_(1 - at.rate * at.weight_decay)
        p.addcdiv_(m_n, work_n, value=-at.rate / (1 - at.beta1**at.step))
        _code(m_n, m, numbers, blocks, room)
        _code(v_n, v, numbers, blocks, room)


def _pieces(numbers: int, most: int) -> Iterator[tuple[slice, slice]]:
    """(numbers, their blocks): whole blocks, at most so many numbers at a time, and at last what is left of a block."""
    whole = numbers - numbers % BLOCK
    for start in range(0, whole, most):
        end = min(start + most, whole)
        yield slice(start, end), slice(start // BLOCK, end // BLOCK)
    if whole < numbers:
        yield slice(whole, numbers), slice(whole // BLOCK, whole // BLOCK + 1)


def _expand(moment: Moment, numbers: slice, blocks: slice, out_n: Tensor, index_n: Tensor) -> None:
    largest_B = moment.largest_B[blocks]
    codes = index_n[: out_n.numel()].copy_(moment.codes_n[numbers])
    torch.index_select(tables(moment.signed, out_n.device).values, 0, codes, out=out_n)
    out_n.view(largest_B.numel(), -1).mul_(largest_B[:, None])


def _code(x_n: Tensor, moment: Moment, numbers: slice, blocks: slice, room: Workspace) -> None:
    """Code x, which is lost, into the moment."""
    largest_B, inverse_B = moment.largest_B[blocks], room.inverse_B[: blocks.stop - blocks.start]
    rows, by = inverse_B.numel(), tables(moment.signed, x_n.device)
    work_n, index_n, codes_n = room.work_n[: x_n.numel()], room.index_n[: x_n.numel()], moment.codes_n[numbers]
    torch.amax(torch.abs(x_n, out=work_n).view(rows, -1), 1, out=largest_B)
    torch.clamp_min(largest_B, torch.finfo(torch.float32).tiny, out=inverse_B).reciprocal_()
    x_n.view(rows, -1).mul_(inverse_B[:, None])
    torch.bitwise_right_shift(x_n.view(torch.int32), CELL, out=index_n).add_(CELLS // 2)
    torch.index_select(by.first_C, 0, index_n, out=codes_n)
    torch.index_select(by.edge_C, 0, index_n, out=work_n)
    codes_n.add_(torch.gt(x_n, work_n, out=index_n))
