"""The section on what was left open, and what was chosen: for layers, for bits, by a search."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from statistics import fmean

from qtool.report.lengths import Axes
from qtool.report.page.drawing import by_block, style_of, thinned
from qtool.report.page.evidence import Evidence, Facts
from qtool.report.page.parts import MOST_ROWS, Absent, PageSection, PageTable, Part, Picture, Words
from qtool.report.page.wordings import duration, place_of, text_of

_TITLE = "Choices"
ALTERNATIVE = "output_error_"
NOT_ALTERNATIVES = ("output_error_rounded",)


def choices_section(evidence: Evidence) -> PageSection | Absent:
    """Return all that was chosen for the recipe, and by how much that was better."""
    parts = [
        *_of_layers(evidence),
        *_strength(evidence),
        *_options(evidence),
        *_budget(evidence.report.get("choosing") or {}),
        *_search(evidence),
    ]
    if not parts:
        return Absent(
            _TITLE, "The recipe left nothing open: see `weights.choose`, `choosing` and `search`."
        )
    return PageSection(_TITLE, tuple(parts))


def _of_layers(evidence: Evidence) -> Iterator[Part]:
    """Yield how often each group dimension or method was the best, where there was a choice."""
    open_layers = [layer for layer in evidence.layers if _alternatives(layer)]
    if not open_layers:
        return
    wins: Counter[tuple[str, str]] = Counter()
    for layer in open_layers:
        errors = _alternatives(layer)
        chosen = min(errors, key=lambda name: abs(errors[name] - layer["output_error"]))
        wins[place_of(layer["name"])[1], chosen] += 1
    names = sorted({name for _, name in wins})
    rows = [
        (kind, *(str(wins[kind, name]) for name in names))
        for kind in dict.fromkeys(place_of(layer["name"])[1] for layer in open_layers)
    ]
    yield Words(
        "For each layer the alternative with the least error on held-out samples was taken; "
        "another than the first only if it saves at least 1 % of what rounding adds. Groups along "
        "out_features are AdaDim's."
    )
    yield PageTable(
        "Layers by the alternative that was taken",
        ("kind of layer", *(f">{name}" for name in names)),
        tuple(rows),
    )


def _alternatives(layer: Facts) -> dict[str, float]:
    return {
        key.removeprefix(ALTERNATIVE): value
        for key, value in layer.items()
        if key.startswith(ALTERNATIVE) and key not in NOT_ALTERNATIVES and value is not None
    }


def _strength(evidence: Evidence) -> Iterator[Part]:
    """Yield how strongly weights were moved against the error that comes in with the inputs."""
    found = [layer for layer in evidence.layers if layer.get("input_error_strength") is not None]
    strengths = [layer["input_error_strength"] for layer in found]
    placed: dict[tuple[int, str], list[float]] = defaultdict(list)
    for layer in found:
        block, kind = place_of(layer["name"])
        if block is not None:
            placed[block, kind].append(layer["input_error_strength"])
    points = [(block, fmean(values)) for (block, _), values in placed.items()]
    if not points:
        return
    said = f"from {min(strengths):.2f} to {max(strengths):.2f}, {fmean(strengths):.2f} on average"

    def paint(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), **{**style_of(0), "linestyle": ""})
        axes.set_ylim(-0.05, 1.05)
        axes.set_ylabel("strength, share of the error")
        by_block(axes)

    title = "Correction of the inputs' error, a point per block and kind of layer"
    yield Picture(
        title,
        f"Strength in {len(strengths)} layers: {said}; 0 corrects nothing, 1 all of it.",
        paint,
    )


def _options(evidence: Evidence) -> Iterator[Part]:
    """Yield the options of the method, the starts of a solver among them."""
    if evidence.manifest is None:
        return
    weights = evidence.manifest.recipe.get("weights") or {}
    options = weights.get("options") or {}
    rows = [("method", str(weights.get("method")))]
    rows += [
        (key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for key, value in options.items()
    ]
    yield PageTable("Method and options that the recipe sets", ("option", "value"), tuple(rows))


def _budget(chosen: Facts) -> Iterator[Part]:
    """Yield what was chosen for all layers under one budget."""
    layers = chosen.get("layers") or ()
    if not layers:
        return
    yield Words(
        f"One budget for all layers: {chosen['average_bits']:.3f} bits per weight were chosen of "
        f"the {chosen['average_bits_asked']:g} that may be, in {duration(chosen['seconds'])}. "
        f"Foretold divergence: {text_of(chosen['divergence'])} nats per token."
    )
    dearest = sorted(layers, key=lambda row: -(row.get("price") or 0))[:MOST_ROWS]
    rows = tuple(
        (
            row["name"],
            str(row.get("num_bits", "as it was")),
            f"{row['bytes'] / 1e6:,.3f}",
            text_of(row.get("price")),
        )
        for row in dearest
    )
    columns = ("layer", ">bits", ">MB", ">price in nats per token")
    yield PageTable(f"The {len(rows)} layers that cost most, of {len(layers)}", columns, rows)


def _search(evidence: Evidence) -> Iterator[Part]:
    """Yield what a search found, and what it tried."""
    found, trials = evidence.report.get("search") or {}, evidence.trials
    if found:
        yield Words(
            f"A search changed the loss of the whole model from {text_of(found['start'])} to "
            f"{text_of(found['end'])} nats per token, in {duration(found['seconds'])} and "
            f"{found['evaluations']} evaluations of the whole model."
        )
        rows = tuple((key, str(value)) for key, value in (found.get("found") or {}).items())
        if rows:
            title = f"What it found, the first {len(rows[:MOST_ROWS])} of {len(rows)}"
            yield PageTable(title, ("key", "value"), rows[:MOST_ROWS])
    if trials:
        tried = thinned([(number, one.loss) for number, one in enumerate(trials)])
        taken = [(number, one.loss) for number, one in enumerate(trials) if one.taken]

        def paint(axes: Axes) -> None:
            axes.plot(*zip(*tried, strict=True), label="tried", **style_of(0) | {"linestyle": ""})
            if taken:
                axes.plot(*zip(*taken, strict=True), label="taken", **style_of(1))
            axes.set_xlabel("number of the trial")
            axes.set_ylabel("KL to the original, nats per token")

        words = f"{len(trials)} losses were measured; {len(taken)} values were taken."
        yield Picture("Losses that the search measured", words, paint)
