"""Where a layer that a run has finished can be read, by other processes too."""

from dataclasses import dataclass
from pathlib import Path

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry
from qtool.checkpoint.spool import Spool


@dataclass(frozen=True, slots=True)
class SpooledLayer:
    """A layer that is stored; picklable."""

    directory: Path
    key: str
    name: str
    entry: LayerEntry

    def load(self, device: str) -> QuantizedTensor:
        """Return it on a device."""
        names = {part: f"{self.name}.{part}" for part in self.entry.layout()}
        tensors = Spool(self.directory).tensors(self.key, names.values())
        parts = {part: tensors[full].to(device) for part, full in names.items()}
        return QuantizedTensor(self.entry.format, self.entry.scheme, self.entry.shape, parts)
