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

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.core import hessian


@dataclass(slots=True)
class Moments:
    """Sums over tokens, float32; `means` divides them."""

    inputs: Tensor  # (in_features, in_features), x x^T
    drift: Tensor  # (in_features, in_features), d x^T
    residual: Tensor | None  # (width, in_features), e x^T; None: no residual stream
    drift_power: Tensor | None = None  # (in_features, in_features), d d^T
    residual_drift: Tensor | None = None  # (width, in_features), e d^T
    residual_power: Tensor | None = None  # (), e^T e
    num_tokens: int = 0

    def add(self, x: Tensor, drift: Tensor, residual: Tensor | None) -> None:
        """Add a batch of tokens.

        Args:
            x: (tokens, in_features) in the dtype of the model.
            drift: Likewise.
            residual: (tokens, width); None if there is no residual stream.
        """
        hessian.accumulate(self.inputs, x)
        hessian.accumulate_cross(self.drift, drift, x)
        if residual is not None and self.residual is not None:
            hessian.accumulate_cross(self.residual, residual, x)
        if self.drift_power is not None:
            hessian.accumulate(self.drift_power, drift)
            if residual is not None and self.residual_drift is not None:
                hessian.accumulate_cross(self.residual_drift, residual, drift)
                assert self.residual_power is not None
                self.residual_power += residual.float().square().sum()
        self.num_tokens += len(x)

    def means(self) -> "Moments":
        """Return the sums divided by the number of tokens; these are the same tensors."""
        for total in (
            self.inputs,
            self.drift,
            self.residual,
            self.drift_power,
            self.residual_drift,
            self.residual_power,
        ):
            if total is not None:
                total /= max(self.num_tokens, 1)
        return self


def zeros(
    in_features: int, width: int | None, *, device: torch.device, for_errors: bool
) -> Moments:
    """Return empty sums.

    Args:
        in_features: Of the linear.
        width: Of the residual stream that its output is added to; None: it isn't.
        device: Of the sums.
        for_errors: Also keep what only `output_error` needs.
    """

    def zero(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    n = in_features
    return Moments(
        inputs=zero(n, n),
        drift=zero(n, n),
        residual=zero(width, n) if width else None,
        drift_power=zero(n, n) if for_errors else None,
        residual_drift=zero(width, n) if width and for_errors else None,
        residual_power=zero() if width and for_errors else None,
    )


@dataclass(frozen=True, slots=True)
class OutputError:
    """Mean squared error of a linear's output (or of the residual stream behind it), and scale."""

    error: float
    power: float
    """Mean squared output of the original linear on the original inputs."""

    @property
    def relative(self) -> float:
        """Return error / power."""
        return self.error / max(self.power, 1e-30)


@dataclass(frozen=True, slots=True)
class OutputErrors:
    """Measures what becomes of one weight's output; what doesn't depend on Q is computed once."""

    moments: Moments
    weight: Tensor  # W, (out_features, in_features) float32
    upstream: Tensor  # mean of W d x^T, likewise
    carried: Tensor  # mean of ||e + W d||^2, () float64
    power: Tensor  # mean of ||W x_o||^2, () float64

    def of(self, quantized: Tensor) -> OutputError:
        """Return the mean of ||e + W d + (W - Q) x||^2, beside that of ||W x_o||^2.

        Args:
            quantized: Q, (out_features, in_features) float32.
        """
        change = self.weight - quantized
        error = self.carried + _dot(change @ self.moments.inputs, change)
        error = error + 2 * _dot(self.upstream, change)
        if self.moments.residual is not None:
            error = error + 2 * _dot(self.moments.residual, change)
        return OutputError(max(float(error), 0.0), max(float(self.power), 0.0))


def output_errors(moments: Moments, weight: Tensor) -> OutputErrors:
    """Return what measures the errors of one weight.

    Args:
        moments: Means, with what errors need.
        weight: W, (out_features, in_features) float32.
    """
    assert moments.drift_power is not None
    upstream = weight @ moments.drift
    drifted = _dot(weight @ moments.drift_power, weight)
    carried = drifted
    if moments.residual is not None:
        assert moments.residual_drift is not None and moments.residual_power is not None
        carried = carried + moments.residual_power.double()
        carried = carried + 2 * _dot(moments.residual_drift, weight)
    power = _dot(weight @ moments.inputs, weight) + drifted + 2 * _dot(upstream, weight)
    return OutputErrors(moments, weight, upstream, carried, power)


def added_error(moments: Moments, target: Tensor, quantized: Tensor) -> float:
    """Return the mean of ||(T - Q) x||^2: what rounding alone adds, drifts aside.

    Args:
        moments: Means.
        target: T, (out_features, in_features) float32, what Q was meant to be.
        quantized: Q, likewise.
    """
    change = target - quantized
    return max(float(_dot(change @ moments.inputs, change)), 0.0)


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
            power = _dot(full @ self.held_out.inputs, full)
            strength = float((along / power.clamp(min=1e-30)).clamp(0, 1))
        return weight + strength * full, strength


def _wanted(moments: Moments, weight: Tensor) -> Tensor:
    """Return the mean of (e + W d) x^T."""
    wanted = weight @ moments.drift
    return wanted if moments.residual is None else wanted + moments.residual
