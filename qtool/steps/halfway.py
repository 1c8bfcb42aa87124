"""How far learning is, as a draft of a checkpoint's writer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter
from qtool.training.schedule import Point


@dataclass(frozen=True, slots=True)
class Halfway:
    """A draft that each look at what is held out replaces."""

    writer: CheckpointWriter
    name: str
    draft: str
    """Each descent has one of its own."""

    def recall(self) -> tuple[Mapping[str, Tensor], Sequence[Point]] | None:
        """Return what was last kept; None: nothing."""
        notes = self.writer.notes(self.name, draft=self.draft)
        if not notes:
            return None
        points = [Point(**point) for point in notes["curve"]]
        return self.writer.tensors(self.name, draft=self.draft), points

    def keep(self, state: Mapping[str, Tensor], points: Sequence[Point]) -> None:
        """Take the place of what was kept before."""
        notes = {"curve": [asdict(point) for point in points]}
        self.writer.keep(self.name, Made(state, notes), draft=self.draft)
