"""How well a model classifies: the scores of GLUE."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.base import CausalModel
from qtool.training.lessons import LessonBatch


@torch.no_grad()
def class_scores(model: CausalModel, lessons: Sequence[LessonBatch]) -> dict[str, float]:
    """Return `accuracy`, and Matthews' correlation (`matthews`, of which CoLA's score is).

    Args:
        model: A classifier.
        lessons: Texts with their classes, on its device.
    """
    said = torch.cat([model(**lesson.inputs).logits.argmax(-1) for lesson in lessons])
    true = torch.cat([lesson.labels for lesson in lessons])
    return {"accuracy": float((said == true).float().mean()), "matthews": matthews(said, true)}


def matthews(said: Tensor, true: Tensor) -> float:
    """Return Matthews' correlation of classes, each (samples,) int64; 0 where one is constant.

    Source: Gorodkin 2004, for any number of classes.
    """
    count = int(max(said.max(), true.max())) + 1
    table = torch.zeros(count, count, dtype=torch.float64)
    table.index_put_((true.cpu(), said.cpu()), torch.ones(len(true)).double(), accumulate=True)
    rows, columns, total = table.sum(1), table.sum(0), table.sum()
    above = table.trace() * total - rows @ columns
    below = math.sqrt(float(total**2 - rows @ rows) * float(total**2 - columns @ columns))
    return float(above) / below if below else 0.0
