"""DoRA: y_NO = m_O / |W + s B A|_O · (x_NI (W + s B A)^T) + b_O, the norms of rows held constant in the backward pass.

Liu et al. 2024, arXiv 2402.09353, equations 5 and 11. The product inside is the fused LoRA projection, so this costs
one more elementwise pass and one output kept for the gradient of m. The norms are never formed from a dense W + s B A:
|w + s b A|² = |w|² + 2 s <w Aᵀ, b> + s² <b A Aᵀ, b>, of products of rank size.
"""

import torch
from torch import Tensor

from welltuned.kernels.lora import Projection, Rows, lora
from welltuned.kernels.nf4 import DenseWeight, FrozenWeight


def row_squares(weight: FrozenWeight) -> Tensor:
    """|w|² of each row [O], in float64."""
    dtype = weight.w_OI.dtype if isinstance(weight, DenseWeight) else torch.float32  # 16 bits widen without a loss
    return weight.dense(dtype).double().square().sum(1)


@torch.no_grad()
def row_norms(p: Projection, a_RI: Tensor, b_OR: Tensor, scale: float, squares_O: Tensor) -> Tensor:
    """|W + s B A| of each row [O], in B's dtype."""
    w_OI = p.weight.dense(a_RI.dtype)
    cross_O = ((w_OI @ a_RI.t()) * b_OR).sum(1)
    own_O = ((b_OR @ (a_RI @ a_RI.t())) * b_OR).sum(1)
    return (squares_O.to(b_OR.dtype) + 2 * scale * cross_O + scale**2 * own_O).clamp_min(0).sqrt()


def dora(
    x_NI: Tensor,
    p: Projection,
    a_KRI: Tensor,
    b_KOR: Tensor,
    magnitude_KO: Tensor,
    squares_O: Tensor,
    bias_O: Tensor | None,
    rows: Rows,
) -> Tensor:
    """y_NO, differentiable in x, A, B, the magnitudes and the bias. `squares_O` as `row_squares` gives it."""
    y_NO = lora(x_NI, p, a_KRI, b_KOR, None, rows)
    parts = []
    for k, span in rows.spans(y_NO.shape[0]):
        norm_O = row_norms(p, a_KRI[k].detach(), b_KOR[k].detach(), float(p.scale_K[k]), squares_O)
        parts.append(y_NO[span] * (magnitude_KO[k] / norm_O).to(y_NO.dtype))
    scaled_NO = parts[0] if len(parts) == 1 else torch.cat(parts)
    return scaled_NO if bias_O is None else scaled_NO + bias_O.to(scaled_NO.dtype)
