"""How a model is run to be timed: by the decode runner or, where it has none, by transformers."""

from typing import Any, Protocol

from torch import Tensor

from qtool.base import CausalModel
from qtool.integrations.transformers.generate import runner_for
from qtool.integrations.transformers.sampling import SharedRunner
from qtool.modeling.load import LoadedModel
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.weights import DecoderWeights, Projection, Projections
from qtool.runtime.kept_states import NOTHING_READ, ReadSoFar, go_on
from qtool.runtime.modules import QuantizedWeight


class Runs(Protocol):
    """A model that reads prompts of one sequence, and tokens after them."""

    weight_bytes: int
    """Read for each token."""

    @property
    def by(self) -> str:
        """Return what runs it."""
        ...

    def prefill(self, ids: Tensor) -> Any:  # noqa: ANN401
        """Read a prompt (1, length) int64; what it returns `decode` takes."""
        ...

    def decode(self, first: Any) -> None:  # noqa: ANN401
        """Choose the likeliest tokens after a prompt."""
        ...


class RunnerRuns:
    """The decode runner."""

    by = "qtool"

    def __init__(self, runner: DecodeRunner, tokens: int) -> None:
        self.runner, self._tokens = runner, tokens
        self.weight_bytes = sum(span_bytes(runner.weights).values())

    def prefill(self, ids: Tensor) -> Tensor:
        """Return the likeliest token after a prompt."""
        return self.runner.prefill(ids).argmax(-1)

    def decode(self, first: Tensor) -> None:
        """Go on greedily."""
        self.runner.greedy(first, self._tokens)


class ForwardRuns:
    """The model's own forward, token by token with its cache, as transformers generates."""

    def __init__(self, loaded: LoadedModel, tokens: int) -> None:
        self._model, self._tokens = loaded.model, tokens
        self.by = f"transformers, {str(loaded.dtype).removeprefix('torch.')}"
        self.weight_bytes = _bytes_per_token(loaded.model)
        keeps = getattr(self._model, "_supports_logits_to_keep", lambda: False)()
        self._keep = {"logits_to_keep": 1} if keeps else {}

    def prefill(self, ids: Tensor) -> tuple[Any, ReadSoFar]:
        """Return what the model says of a prompt, and what it keeps."""
        return go_on(self._model, ids, NOTHING_READ, self._keep)

    def decode(self, first: tuple[Any, ReadSoFar]) -> None:
        """Go on greedily."""
        output, kept = first
        for _ in range(self._tokens):
            token = output.logits[:, -1:].argmax(-1)
            output, kept = go_on(self._model, token, kept, self._keep)


def runs_of(loaded: LoadedModel, tokens: int, *, room: int) -> Runs:
    """Return what runs a model as `generate` does.

    Args:
        loaded: The model.
        tokens: How many `decode` chooses.
        room: The longest prompt with all that follows it.
    """
    decoder = runner_for(loaded.model)
    if not isinstance(decoder, SharedRunner) or room > (decoder.weights.longest or room):
        return ForwardRuns(loaded, tokens)
    runner = DecodeRunner(decoder.weights, decoder.ops, max_length=room)
    return RunnerRuns(runner, tokens)


def span_bytes(weights: DecoderWeights) -> dict[str, int]:
    """Return the bytes of weights that each part of a decoding step reads."""
    spans = ("qkv", "output", "gate_up", "down")
    sizes = {
        name: sum(_projection_bytes(getattr(layer, name)) for layer in weights.layers)
        for name in spans
    }
    return {**sizes, "head": _projection_bytes(weights.head)}


def _projection_bytes(projections: Projections) -> int:
    parts = projections if isinstance(projections, tuple) else (projections,)
    return sum(map(_part_bytes, parts))


def _part_bytes(part: Projection) -> int:
    """Return the bytes of what a backend has prepared, if it says so."""
    if isinstance(part, Tensor):
        return part.nbytes
    told = getattr(part, "num_bytes", 0)
    return int(told() if callable(told) else told)


def _bytes_per_token(model: CausalModel) -> int:
    """Return the bytes of all weights but those of an embedding that isn't the head as well."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or isinstance(embedding, QuantizedWeight)
    tied = tied or getattr(head, "weight", None) is embedding.weight
    skipped = set() if tied else {id(embedding.weight)}
    tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}
    return sum(one.nbytes for key, one in tensors.items() if key not in skipped)
