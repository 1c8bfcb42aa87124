"""The gates of a recipe: what each reads of a run, and on which side of its limit it may lie.

A gate is data: to add one, add an entry to `GATES`. What it reads is a path into the figures of a
run, such as `closeness.*.kl_mean`; `*` stands for each subject: the text and the chats, or each
task. Torch-free.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf

from qtool.plugins import describe_miss
from qtool.recipe.document import Keys, dotted
from qtool.recipe.schema import Recipe

EACH = "*"
ON_TEXT, ON_CHATS = "text", "chats"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A figure of a run that can fail it."""

    name: str
    """Its key under `gates`."""
    reads: str
    """Dotted path into the figures of a run; the first word is the measurement."""
    summary: str
    """What the figure is, for messages and tables."""
    at_least: bool = False
    """The limit is the least that is allowed; else the most."""
    unit: str = ""
    lowest: float = 0.0
    """That makes sense as a limit."""
    highest: float = inf
    """Likewise."""
    tested: bool = False
    """Beyond the limit is a failure only if a paired test shows the model to be worse."""

    @property
    def measurement(self) -> str:
        """Return what has to be measured for it, a key of `MEASUREMENTS`."""
        return self.reads.partition(".")[0]


GATES = (
    Gate(name="perplexity", reads="perplexity.value", summary="perplexity on the text"),
    Gate(
        name="perplexity_ratio",
        reads="ratios.perplexity",
        summary="perplexity over that of the original",
    ),
    Gate(
        name="kl_mean",
        reads="closeness.*.kl_mean",
        summary="mean KL divergence to the original",
        unit="nats per token",
    ),
    Gate(
        name="kl_p99",
        reads="closeness.*.kl_p99",
        summary="KL divergence that one token in a hundred exceeds",
        unit="nats per token",
    ),
    Gate(
        name="same_token",
        reads="closeness.*.same_token",
        summary="share of tokens where both find the same likeliest",
        at_least=True,
        highest=1.0,
    ),
    Gate(
        name="score_loss",
        reads="scores.*.loss",
        summary="what a task's score lost against the original, by a paired test",
        tested=True,
    ),
    Gate(
        name="strict_bits",
        reads="size.strict_bits",
        summary="bits on disk per weight of the whole model",
    ),
    Gate(
        name="average_bits",
        reads="size.average_bits",
        summary="stored bits per weight of the quantized layers",
    ),
    Gate(name="bytes", reads="size.bytes", summary="size of the weight files", unit="bytes"),
    Gate(
        name="prefill_ratio",
        reads="speed.prefill_ratio",
        summary="tokens/s of a prompt, over the original's in the same run",
        at_least=True,
    ),
    Gate(
        name="decode_ratio",
        reads="speed.decode_ratio",
        summary="tokens/s of decoding, over the original's in the same run",
        at_least=True,
    ),
    Gate(
        name="copy_share",
        reads="kernels.copy_share",
        summary="bandwidth of all kernels at one token, as a share of a copy's in the same run",
        at_least=True,
    ),
    Gate(
        name="card_memory",
        reads="kernels.memory_bytes",
        summary="peak memory of the card while the result decodes",
        unit="bytes",
    ),
    Gate(
        name="peak_memory",
        reads="cost.peak_memory_bytes",
        summary="peak memory of quantizing: of the card if on one, else of the process",
        unit="bytes",
    ),
    Gate(
        name="quantize_seconds",
        reads="cost.quantize_seconds",
        summary="time of quantizing",
        unit="s",
    ),
    Gate(name="seconds", reads="cost.seconds", summary="time of all steps", unit="s"),
)
GATE_OF: Mapping[str, Gate] = {gate.name: gate for gate in GATES}


def _has_text(recipe: Recipe) -> bool:
    return recipe.eval is not None and recipe.eval.dataset is not None


def _has_both_texts(recipe: Recipe) -> bool:
    return recipe.eval is not None and recipe.eval.dataset is not None and recipe.eval.baseline


def _has_scores(recipe: Recipe) -> bool:
    return recipe.eval is not None and bool(recipe.eval.tasks) and recipe.eval.baseline


BOTH_TEXTS = "a section 'eval' with a dataset and baseline: true"
MEASUREMENTS: Mapping[str, tuple[Callable[[Recipe], bool], str]] = {
    "size": (lambda _: True, ""),
    "cost": (lambda _: True, ""),
    "perplexity": (_has_text, "a section 'eval' with a dataset"),
    "ratios": (_has_both_texts, BOTH_TEXTS),
    "closeness": (_has_both_texts, BOTH_TEXTS),
    "scores": (_has_scores, "a section 'eval' with tasks and baseline: true"),
    "speed": (lambda recipe: recipe.bench is not None, "a section 'bench'"),
    "kernels": (
        lambda recipe: recipe.bench is not None and recipe.bench.gpu,
        "a section 'bench' with gpu: true",
    ),
}
"""Whether a recipe makes a measurement, and what it would have to say."""


def subjects(gate: Gate, recipe: Recipe) -> tuple[str, ...]:
    """Return what a gate is read for one by one; empty: it has a single value."""
    section = recipe.eval
    if EACH not in gate.reads or section is None:
        return ()
    if gate.tested:
        return section.tasks
    return (ON_TEXT, ON_CHATS) if section.chats is not None else (ON_TEXT,)


def gate_problems(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    """Yield path and sentence of each gate that can't be judged, without the place."""
    for name, limit in recipe.gates.items():
        path: Keys = ("gates", name)
        gate = GATE_OF.get(name)
        if gate is None:
            yield path, describe_miss(name, tuple(GATE_OF), "gates").removesuffix(".")
            continue
        is_made, wanted = MEASUREMENTS[gate.measurement]
        if not is_made(recipe):
            yield path, f"gates.{name} needs {wanted}, which the recipe doesn't have"
            continue
        known = subjects(gate, recipe)
        if isinstance(limit, Mapping) and not known:
            yield path, f"gates.{name} has one value; it takes one number"
            continue
        for one, number in limit.items() if isinstance(limit, Mapping) else [(None, limit)]:
            where = path if one is None else (*path, one)
            if one is not None and one not in known:
                miss = describe_miss(one, known, f"what gates.{name} is measured on")
                yield where, miss.removesuffix(".")
            elif number is not None and not gate.lowest <= number <= gate.highest:
                bounds = f"from {gate.lowest:g}" + (f" to {gate.highest:g}" * (gate.highest < inf))
                yield where, f"{dotted(where)} is {number:g}; it should be {bounds}"
