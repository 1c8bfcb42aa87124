"""Second moments of what a linear sees: enough to shift its target and to measure its error.

Three things differ between the original and the quantized model where a linear is called: its input
(x instead of x_o), the residual stream that its output is added to (r instead of r_o), and its
weight. With the drift d = x_o - x and the residual drift e = r_o - r, quantizing W to Q leaves

    r_o + W x_o - (r + Q x)  =  e + W d + (W - Q) x

in the residual stream. Everything below is a quadratic form of that in W and Q, so means of the
products of x, d and e over tokens are all that is kept of the tokens. Weights are
(out_features, in_features).

Sources: QEP (arXiv 2504.09629), GPTAQ (arXiv 2504.02692) and Qronos (arXiv 2505.11695) compensate
d; that e can be compensated in the same way is output matching as in LoaQ (arXiv 2509.06297).
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from qtool.core import hessian

MomentName = Literal["xx", "dx", "ex", "dd", "ed", "ee"]
"""Of which two a token's product is: xx is x x^T, (in_features, in_features), likewise dx and dd;
ex and ed are (width, in_features), ee is e^T e, ()."""


@dataclass(slots=True)
class Moments:
    """Sums over tokens and their count, so that those of two sets of tokens add up."""

    sums: dict[MomentName, Tensor]
    """float32; e is missing where no residual stream is looked at."""
    num_tokens: int = 0

    def add(self, x: Tensor, drift: Tensor, residual: Tensor | None) -> None:
        """Add a batch of tokens, in place.

        Args:
            x: (tokens, in_features) in the dtype of the model.
            drift: Likewise.
            residual: (tokens, width); None if there is no residual stream.
        """
        factors = {"x": x, "d": drift} | ({} if residual is None else {"e": residual})
        for product, total in self.sums.items():
            left, right = (factors[factor] for factor in product)
            if product == "ee":
                total += left.float().square().sum()
            else:
                hessian.accumulate(total, left, right)
        self.num_tokens += len(x)

    def merged(self, other: "Moments") -> "Moments":
        """Return the moments of the tokens of both, which are of the same linear."""
        sums = {product: total + other.sums[product] for product, total in self.sums.items()}
        return Moments(sums, self.num_tokens + other.num_tokens)

    def keep(self, *products: MomentName) -> None:
        """Let go of all sums but some, in place."""
        self.sums = {name: total for name, total in self.sums.items() if name in products}

    def on(self, device: torch.device | str) -> "Moments":
        """Return the same with the sums on a device."""
        return Moments(
            {name: total.to(device) for name, total in self.sums.items()}, self.num_tokens
        )

    def of_rows(self, rows: slice) -> "Moments":
        """Return those that are of some rows of the linear; the errors of all parts add up.

        What isn't of a row is of the part that begins at zero.
        """
        sums = dict(self.sums)
        for product in sums.keys() & {"ex", "ed"}:
            sums[product] = sums[product][rows]
        if "ee" in sums and rows.start:
            sums["ee"] = torch.zeros_like(sums["ee"])
        return Moments(sums, self.num_tokens)

    def mean(self, product: MomentName) -> Tensor:
        """Return the mean of a product over all tokens, float32."""
        return self.sums[product] / max(self.num_tokens, 1)


@dataclass(slots=True)
class OrderedTotal:
    """The moments of all tokens, from those of parts that come in order; of at least one.

    Sums of float64, rounded once: so it doesn't matter who summed which part. One part stays as it
    is. A part isn't kept, so there is one at a time beside the total.
    """

    _only: Moments | None = None
    _sums: dict[MomentName, Tensor] = field(default_factory=dict)
    _num_tokens: int = 0

    def add(self, part: Moments) -> None:
        """Add the next part; its place is that of the first."""
        self._num_tokens += part.num_tokens
        if self._only is None and not self._sums:
            self._only = part
            return
        if self._only is not None:
            first, self._only = self._only.sums, None
            self._sums = {product: first.pop(product).double() for product in list(first)}
        for product, total in self._sums.items():
            total += part.sums[product].to(total.device)

    def moments(self) -> Moments:
        """Return the total, float32; it is asked for once, at the end."""
        if self._only is not None:
            return self._only
        rounded = {product: self._sums.pop(product).float() for product in list(self._sums)}
        return Moments(rounded, self._num_tokens)


def no_moments(
    in_features: int, width: int | None, *, device: torch.device, for_errors: bool
) -> Moments:
    """Return the moments of no tokens.

    Args:
        in_features: Of the linear.
        width: Of the residual stream that its output is added to; None: it isn't.
        device: Of the sums.
        for_errors: Also keep what only `OutputErrors` needs.
    """
    n = in_features
    shapes: dict[MomentName, tuple[int, ...]] = {"xx": (n, n), "dx": (n, n)}
    if width:
        shapes["ex"] = (width, n)
    if for_errors:
        shapes["dd"] = (n, n)
    if width and for_errors:
        shapes |= {"ed": (width, n), "ee": ()}
    return Moments({key: torch.zeros(shape, device=device) for key, shape in shapes.items()})


class OutputErrors:
    """Measures what becomes of one weight's output, or of the residual stream behind it.

    What doesn't depend on Q is computed once.
    """

    def __init__(self, moments: Moments, weight: Tensor) -> None:
        """Take moments that were made `for_errors`, and W, (out_features, in_features) float32."""
        self._moments, self._weight = moments, weight
        self._upstream = weight @ moments.mean("dx")  # mean of W d x^T
        drifted = _dot(weight @ moments.mean("dd"), weight)
        self._carried = drifted  # mean of ||e + W d||^2, () float64
        if "ex" in moments.sums:
            self._carried = self._carried + moments.mean("ee").double()
            self._carried = self._carried + 2 * _dot(moments.mean("ed"), weight)
        power = _dot(weight @ moments.mean("xx"), weight) + drifted
        power = power + 2 * _dot(self._upstream, weight)
        self.power = max(float(power), 1e-30)
        """Mean of ||W x_o||^2, the squared output of the original on its own inputs; never 0."""

    def of(self, quantized: Tensor) -> float:
        """Return the mean of ||e + W d + (W - Q) x||^2, Q float32."""
        change = self._weight - quantized
        error = self._carried + _dot(change @ self._moments.mean("xx"), change)
        error = error + 2 * _dot(self._upstream, change)
        if "ex" in self._moments.sums:
            error = error + 2 * _dot(self._moments.mean("ex"), change)
        return max(float(error), 0.0)


def added_error(moments: Moments, target: Tensor, quantized: Tensor) -> float:
    """Return the mean of ||(T - Q) x||^2: what rounding alone adds, drifts aside.

    T, what Q was meant to be, and Q are (out_features, in_features) float32.
    """
    change = target - quantized
    return max(float(_dot(change @ moments.mean("xx"), change)), 0.0)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Return the sum of products, () float64."""
    return (first * second).sum(1).double().sum()


@dataclass(frozen=True, slots=True)
class Shifter:
    """Shifts weights so that they undo what quantization upstream did to x and r.

    The mean of ||e + W d + (W - Q) x||^2 equals that of ||(W' - Q) x||^2 plus a constant for
    W' = W + (W D + C) H^-1, with D = E d x^T, C = E e x^T and H = E x x^T: any solver that knows
    nothing but H compensates both drifts when it is given W'. With a strength a in [0, 1] the shift
    is a (W D + C) H^-1.
    """

    train: Moments
    held_out: Moments
    lower: Tensor | None  # Cholesky factor of the damped H; None: it has none, nothing is shifted

    def shift(self, weight: Tensor, strength: float | None) -> tuple[Tensor, float]:
        """Return the shifted weight and the strength used.

        Args:
            weight: (out_features, in_features) float32.
            strength: In [0, 1]; None: the best on the held-out tokens, zero if none helps.
        """
        if strength == 0 or self.lower is None:
            return weight, 0.0
        full = hessian.solve_right(self.lower, _wanted(self.train, weight))
        if strength is None:
            along = _dot(_wanted(self.held_out, weight), full)
            power = _dot(full @ self.held_out.mean("xx"), full)
            strength = float((along / power.clamp(min=1e-30)).clamp(0, 1))
        return weight + strength * full, strength


def _wanted(moments: Moments, weight: Tensor) -> Tensor:
    """Return the mean of (e + W d) x^T."""
    wanted = weight @ moments.mean("dx")
    return wanted + moments.mean("ex") if "ex" in moments.sums else wanted
