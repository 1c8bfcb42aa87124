"""The Hessian of a linear layer's output error, H = mean of x x^T, and its inverse factor.

Source: Frantar et al. 2022 (GPTQ, arXiv 2210.17323). All solvers are invariant to its scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT64_LIMIT = 8192
"""Up to this width the factorization runs in float64, which is affordable; above, in float32."""
LOOKED_AT = 4096
"""Rows of a matrix that are looked at together."""
SQUARE_STRIP = 384
"""Columns of a square sum that are multiplied together on a processor: the fewer, the less of it
is computed twice, and the slower is a product."""
MIN_DAMPING, MAX_DAMPING = 1e-8, 1.0
"""Less is lost in rounding; more says that nothing is known of the inputs."""


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right of one batch to a sum, in place.

    Products of float16 or bfloat16 numbers are exact in float32, so tensor cores that accumulate
    in float32 lose nothing; float32 inputs are multiplied without TF32.

    (tokens, m) and (tokens, n) in the dtype of the model are added to (m, n) float32.
    """
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        total += torch.mm(left.T, right, out_dtype=torch.float32)
    elif left is right and not left.is_cuda:
        _accumulate_square(total, left.float())
    else:
        total.addmm_(left.T.float(), right.float())


def _accumulate_square(total: Tensor, x: Tensor) -> None:
    """Add x^T x, by strips up to the diagonal; what is beyond it is their mirror image."""
    for start in range(0, len(total), SQUARE_STRIP):
        strip = slice(start, start + SQUARE_STRIP)
        total[strip, : strip.stop].addmm_(x[:, strip].T, x[:, : strip.stop])
        total[:start, strip] = total[strip, :start].T


def token_weights(x: Tensor, ratio: float) -> Tensor:
    """Return what shrinks tokens whose norm exceeds `ratio` times the median norm to that norm.

    The first tokens of a sequence carry massive activations in some layers, and dominate a Hessian
    (Sun et al. 2024, arXiv 2402.17762). Shrinking them isn't for free: later layers rely on them,
    and docs/log.md has a model that it made worse.

    (tokens, in_features) -> (tokens, 1) float32, at most one; the ratio is at least 1.
    """
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    limit = ratio * norms.median()
    return (limit / norms.clamp(min=1e-30)).clamp(max=1.0)


@dataclass(frozen=True, slots=True)
class Factor:
    """A damped Hessian and the factor of its inverse."""

    hessian: Tensor  # (n, n) float32, damped, in natural order
    upper: Tensor  # (n, n) float32, upper^T upper is the inverse of H in the order asked for
    damping: float
    """The damping that it took: more than asked for if the first tries weren't positive."""


def damp(hessian: Tensor, damping: float) -> Tensor:
    """Return H with dead inputs set to one and `damping` * mean diagonal added, float32."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if bool((~dead).any()) else torch.ones_like(diagonal[0])
    diagonal += damping * mean
    diagonal[dead] = mean
    return damped


def cholesky(damped: Tensor) -> Tensor | None:
    """Return L with H = L L^T, (n, n) lower triangular, in float64 where that is affordable.

    None if H, (n, n) float32, isn't positive or not finite.
    """
    dtype = torch.float64 if len(damped) <= FLOAT64_LIMIT else torch.float32
    lower, info = torch.linalg.cholesky_ex(damped.to(dtype))
    # In strips: what `isfinite` computes on the way is as large as what it is given.
    if int(info) != 0 or not all(
        bool(torch.isfinite(part).all()) for part in lower.split(LOOKED_AT)
    ):
        return None
    return lower


def solve_right(lower: Tensor, right: Tensor) -> Tensor:
    """Return right H^-1, (rows, n) float32, with H = L L^T."""
    return torch.cholesky_solve(right.T.to(lower.dtype), lower).T.float()


def factor_inverse(damped: Tensor, order: Tensor | None = None) -> Tensor | None:
    """Return U with H^-1 = U^T U, (n, n) float32 upper triangular; None if H isn't positive.

    With the exchange matrix J, chol(J H J) = L gives U = J L^-1 J: one Cholesky and one
    triangular solve. No more than three such matrices are alive at once beside H, which for the
    widest layers are the most memory that a run takes.

    Args:
        damped: H, (n, n) float32, in natural order.
        order: (n,) order of rows and columns in which U is that of H; None: as they are.
    """
    if order is None:
        lower = cholesky(damped.flip(0, 1))
    else:
        backwards = order.flip(0)
        lower = cholesky(damped[backwards.unsqueeze(1), backwards])
    if lower is None:
        return None
    inverse = torch.linalg.solve_triangular(
        lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False
    )
    del lower
    return inverse.flip(0, 1).float().contiguous()


def factorize(hessian: Tensor, *, damping: float, order: Tensor | None = None) -> Factor | None:
    """Damp H and factor its inverse; multiply the damping by ten until that works.

    Args:
        hessian: (n, n) float32.
        damping: First try, as a fraction of the mean diagonal; the last one is `MAX_DAMPING`.
        order: (n,) order in which columns will be solved; None: as they are.

    Returns:
        The factor, or None if even a damping of one isn't enough (NaN, or wildly scaled inputs).
    """
    tried = 0.0
    while damping > tried:
        damped = damp(hessian, damping)
        upper = factor_inverse(damped, order)
        if upper is not None:
            return Factor(damped, upper, damping)
        tried, damping = damping, min(10 * damping, MAX_DAMPING)
    return None


def act_order(hessian: Tensor) -> Tensor:
    """Return the columns by descending diagonal, so that many are left to absorb their error."""
    return hessian.diagonal().argsort(descending=True, stable=True)


def group_order(hessian: Tensor, group_size: int) -> Tensor:
    """Return an order that keeps groups together: inside each by diagonal, groups by maximum.

    Source: group-aware reordering (arXiv 2505.14638). A short last group stays last.
    """
    diagonal = hessian.diagonal()
    full = len(diagonal) // group_size
    groups = diagonal[: full * group_size].view(full, group_size)
    inside = groups.argsort(dim=1, descending=True, stable=True)
    inside = inside + group_size * torch.arange(full, device=diagonal.device).unsqueeze(1)
    outer = groups.amax(1).argsort(descending=True, stable=True)
    tail = diagonal[full * group_size :].argsort(descending=True, stable=True)
    return torch.cat([inside[outer].flatten(), tail + full * group_size])


def relative_loss(error: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """Return tr(E H E^T) / tr(W H W^T) for (rows, n) matrices."""
    loss = ((error @ hessian) * error).sum().double()
    power = ((weight @ hessian) * weight).sum().double()
    return float(loss / power.clamp(min=1e-30))
