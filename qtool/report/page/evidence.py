"""What one directory says of a run, and the few things that several sections ask of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qtool.checkpoint.manifest import Manifest
from qtool.checkpoint.shards import TensorSpec
from qtool.checkpoint.sizes import AS_THEY_WERE, QUANTIZED, DiskSizes
from qtool.recipe.gates import ON_CHATS, ON_TEXT
from qtool.report.curves import HeldOut
from qtool.report.trials import TrialLine

Facts = Mapping[str, Any]
"""A file of qtool's, as JSON has it."""
NOTHING: Facts = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that a directory has; what isn't there is empty, and what can't be read is in `gaps`."""

    name: str
    manifest: Manifest | None = None
    sizes: DiskSizes | None = None
    unquantized: Mapping[str, TensorSpec] = field(default_factory=dict)
    """Tensors that are as they were, by name."""
    report: Facts = field(default_factory=dict)
    """quantization_report.json."""
    curves: Mapping[str, HeldOut] = field(default_factory=dict)
    """Of tuning.jsonl."""
    trials: Sequence[TrialLine] = ()
    """Of search.jsonl."""
    texts: Facts = field(default_factory=dict)
    """Perplexities and closeness, as `qtool eval --json` writes them."""
    tasks: Facts = field(default_factory=dict)
    """Scores, as `qtool eval --tasks --json` writes them."""
    speeds: Facts = field(default_factory=dict)
    """Tokens per second, as `qtool bench --json` writes them."""
    kernels: Facts = field(default_factory=dict)
    """As `qtool bench --gpu --json` writes them."""
    verdict: Facts = field(default_factory=dict)
    """run.json of `qtool run`."""
    swept: Facts = field(default_factory=dict)
    """Its row in the sweep.json of the directory above."""
    gaps: Sequence[str] = ()

    @property
    def layers(self) -> Sequence[Facts]:
        """Return what the report says of each layer, in the order of the model."""
        return self.report.get("layers") or ()

    @property
    def block_bits(self) -> float | None:
        """Return stored bits per weight of the matrices of the blocks, quantized or not."""
        kinds = self.sizes.kinds if self.sizes is not None else ()
        blocks = [each for each in kinds if each.kind in (QUANTIZED, AS_THEY_WERE)]
        weights = sum(each.num_weights for each in blocks)
        return 8 * sum(each.num_bytes for each in blocks) / weights if weights else None

    def agreement(self, what: str) -> Facts:
        """Return how closely the result follows its original on `text` or `chats`; or nothing.

        An evaluation says more than the check at the end of a run, which is shorter.
        """
        key = {ON_TEXT: "agreement", ON_CHATS: "chats"}[what]
        return self.texts.get(key) or (self.report.get("check") or NOTHING).get(what) or NOTHING

    def perplexities(self) -> tuple[Facts | None, Facts | None]:
        """Return what was measured of the result, and of its original."""
        found = [one.get("perplexity") for one in self.texts.get("figures") or ()]
        return (found[-1] if found else None, found[0] if len(found) > 1 else None)
