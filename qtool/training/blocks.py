"""Block tuning: the quantized weights of one block learn to give the original block's outputs.

Sources: AutoRound (arXiv 2309.05516) and SignRoundV2 (arXiv 2512.04746): learned rounding, inputs
of the quantized model, the best state kept; EfficientQAT's first phase (arXiv 2407.11062).
Tokens count by their relative error: the few with huge outputs (attention sinks) would be all.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qtool.training.descent import Learning, Point, Schedule, descend
from qtool.training.student import LearnedLinear

Forward = Callable[[int], Tensor]
"""From the number of a batch to the block's output, (samples, length, width)."""


def tune_block(
    layers: Sequence[LearnedLinear],
    forward: Forward,
    targets: Sequence[Tensor],
    num_train: int,
    schedule: Schedule,
    report: Callable[[Point], None],
) -> list[Point]:
    """Let the layers of one block learn; they end where the held-out loss was least.

    Args:
        layers: They stand in the block that `forward` runs.
        forward: The quantized block on the inputs that the quantized model gives it.
        targets: What the original block gives for the original's inputs, likewise.
        num_train: Batches from this one on are held out.
        schedule: How long and how fast.
        report: Is told of each point; losses are squared errors relative to the outputs.
    """
    sizes = [target.float().square().sum(-1, keepdim=True) for target in targets]
    typical = torch.cat([size.flatten() for size in sizes]).median()
    weights = [1 / torch.maximum(size, typical) for size in sizes]

    def loss(batch: int) -> Tensor:
        error = (forward(batch).float() - targets[batch].float()).square()
        return (error * weights[batch]).sum(-1).mean()

    @torch.no_grad()
    def held_out() -> float:
        return float(sum(loss(batch) for batch in range(num_train, len(targets))))

    batch = 0

    def feed(step: int) -> None:
        nonlocal batch
        batch = step % num_train

    what = Learning(layers, (), feed, lambda: loss(batch), held_out)
    return descend(what, schedule, report)
