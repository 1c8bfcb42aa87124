"""What a group of linears that share an input sees: one pass over the cached block inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.core import hessian
from qtool.errors import MethodError
from qtool.modeling.blocks import Block


@dataclass(slots=True)
class Streams:
    """Block inputs of the original and of the quantized model, batch by batch, on the CPU."""

    original: list[Tensor]
    quantized: list[Tensor]
    num_train: int
    """Batches from this one on are held out."""

    def advance(self, original: Block, quantized: Block) -> None:
        """Replace all block inputs by the block's outputs."""
        for index in range(len(self.original)):
            self.original[index] = original.run(self.original[index]).cpu()
            self.quantized[index] = quantized.run(self.quantized[index]).cpu()


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Second moments of the training tokens, and the held-out tokens themselves."""

    hessian: Tensor
    """Mean of x x^T over training tokens of the quantized stream, float32."""
    drift: Tensor
    """Mean of (x_original - x) x^T: what quantization upstream did to the inputs, float32."""
    original: Tensor  # (tokens, in_features), held out, inputs in the original model
    quantized: Tensor  # (tokens, in_features), held out, inputs in the quantized model
    num_tokens: int


def measure_inputs(
    linear: str,
    original: Block,
    quantized: Block,
    streams: Streams,
    *,
    token_cap: float,
) -> InputStatistics:
    """Run both blocks up to `linear` on every batch.

    Args:
        linear: Name of the first of the linears that share the input.
        original: The block with its original weights.
        quantized: The block as far as it is quantized.
        streams: Cached inputs of the block.
        token_cap: Tokens above this multiple of the median norm are shrunk to it.

    Raises:
        MethodError: the inputs aren't finite.
    """
    total = drift = None
    kept: list[tuple[Tensor, Tensor]] = []
    num_tokens = 0
    for index, (first, second) in enumerate(zip(streams.original, streams.quantized, strict=True)):
        reference = original.inputs_of(linear, first)
        x = quantized.inputs_of(linear, second)
        if index >= streams.num_train:
            kept.append((reference, x))
            continue
        capped = hessian.cap_tokens(x, token_cap)
        if total is None or drift is None:
            n = x.shape[-1]
            total = torch.zeros(n, n, device=x.device)
            drift = torch.zeros(n, n, device=x.device)
        hessian.accumulate(total, capped)
        hessian.accumulate_cross(drift, reference - x, capped)
        num_tokens += len(x)
    assert total is not None and drift is not None
    if not bool(torch.isfinite(total).all()):
        raise MethodError(
            f"The inputs of {linear} overflow: NaN or infinity among them. Use more bits "
            "or smaller groups, or a source stored in bfloat16."
        )
    return InputStatistics(
        hessian=total / num_tokens,
        drift=drift / num_tokens,
        original=torch.cat([reference for reference, _ in kept]),
        quantized=torch.cat([x for _, x in kept]),
        num_tokens=num_tokens,
    )


def output_error(statistics: InputStatistics, weight: Tensor, quantized: Tensor) -> float:
    """Return ||X_original W^T - X Q^T||^2 / ||X_original W^T||^2 on the held-out tokens."""
    error = power = 0.0
    for reference, x in zip(
        statistics.original.split(4096), statistics.quantized.split(4096), strict=True
    ):
        target = reference.float() @ weight.T
        error += float((target - x.float() @ quantized.T).square().sum())
        power += float(target.square().sum())
    return error / max(power, 1e-30)


def shift_target(
    statistics: InputStatistics, weight: Tensor, *, damping: float, strength: float | None
) -> tuple[Tensor, float]:
    """Shift the weight so that it undoes what quantization upstream did to its inputs.

    ||W X_o - Q X||^2 equals ||W' X - Q X||^2 plus a constant, W' = W (I + D H^-1), D the drift
    (QEP, arXiv 2504.09629; GPTAQ and Qronos solve the same problem). With a strength a the shift
    is a W D H^-1.

    Args:
        statistics: Of the layer's inputs.
        weight: (out_features, in_features) float32.
        damping: Fraction of the mean diagonal added to H.
        strength: In [0, 1]; None: the one that is best on the held-out tokens, zero if none helps.

    Returns:
        The shifted weight and the strength used.
    """
    if strength == 0:
        return weight, 0.0
    factor = hessian.factorize(statistics.hessian, damping=damping)
    if factor is None:
        return weight, 0.0
    shift = (weight @ statistics.drift) @ factor.upper.T @ factor.upper
    if strength is None:
        along = torch.zeros((), device=weight.device, dtype=torch.float64)
        power = torch.zeros_like(along)
        for reference, x in zip(
            statistics.original.split(4096), statistics.quantized.split(4096), strict=True
        ):
            wanted = (reference - x).float() @ weight.T
            given = x.float() @ shift.T
            along += (wanted * given).sum()
            power += given.square().sum()
        strength = float((along / power.clamp(min=1e-30)).clamp(0, 1))
    return weight + strength * shift, strength
