"""The table of measured figures, the baseline first."""

from dataclasses import asdict
from itertools import compress
from typing import TYPE_CHECKING, Any

from qtool.cli import console
from qtool.wording import gigabytes

if TYPE_CHECKING:
    from qtool.evaluation.agreement import Agreement
    from qtool.evaluation.closeness import Closeness
    from qtool.pipeline import BenchResult, Comparison, ModelFigures

TEXT_WIDTH = 100
COLUMNS = ["model", ">bits per weight", ">size", ">quantized in", ">perplexity"]
COLUMNS += [">KL", ">KL, chats"]
COLUMNS += [">prefill tokens/s", ">decode tokens/s", "backend"]


def comparison_report(result: "Comparison") -> dict[str, Any]:
    """Return figures and closeness for machines."""
    closeness = asdict(result.closeness)
    return {
        "figures": [asdict(one) for one in result.figures],
        "agreement": closeness["text"],
        "chats": closeness["chats"],
        "versions": result.versions,
    }


def speed_report(result: "BenchResult") -> dict[str, Any]:
    """Return figures of models that were timed, for machines."""
    cpu = {} if result.cpu is None else {"cpu": asdict(result.cpu)}
    figures = [asdict(one) for one in result.figures]
    return {"figures": figures, "versions": result.versions, **cpu}


def print_comparison(result: "Comparison") -> None:
    """Print one row per model, and how closely the last follows the first."""
    print_models(result.figures, result.closeness)
    if result.closeness.text is not None:
        _print_agreement(result.closeness)


def print_models(figures: tuple["ModelFigures", ...], closeness: "Closeness | None" = None) -> None:
    """Print one row per model, with only the columns that were measured."""
    *others, last = figures
    rows = [_cells(one, None) for one in others]
    rows.append(_cells(last, closeness))
    measured = [any(column) for column in zip(*rows, strict=True)]
    table = [compress(row, measured) for row in (COLUMNS, *rows)]
    console.print_table("", table[0], table[1:])
    console.print_lines(_conditions(figures))


def _print_agreement(closeness: "Closeness") -> None:
    """Print how closely the model follows its original, and the first text that differs."""
    agreement, chats = closeness.text, closeness.chats
    assert agreement is not None
    _print_divergence("Against the original", agreement)
    if chats is not None:
        _print_divergence(f"On chats ({chats.dataset})", chats)
    elif closeness.no_chats is not None:
        console.print_lines([f"On chats nothing was compared: {closeness.no_chats}"])
    if agreement.greedy_equal_share is not None:
        console.out.print(
            f"Greedy continuations of {len(agreement.greedy)} prompts: the first "
            f"{100 * agreement.greedy_equal_share:.0f} % are equal."
        )
    differing = next((one for one in agreement.greedy if one.equal_tokens < one.tokens), None)
    if differing is not None:
        for name in ("prompt", "original", "quantized"):
            text = " ".join(getattr(differing, name).split())
            console.out.print(f"  {name:>9}: {text[:TEXT_WIDTH]}", markup=False)


def _print_divergence(where: str, found: "Agreement") -> None:
    top1 = f"{100 * found.top1_agreement:.1f} ± {100 * found.top1_standard_error:.1f} %"
    kl = f"{found.kl_divergence:.4f} ± {found.kl_standard_error:.4f}"
    console.out.print(
        f"{where}, {found.positions} predictions: KL divergence {kl} nats per token "
        f"(99th percentile {found.kl_p99:.3f}), same likeliest token {top1}."
    )


def _cells(figures: "ModelFigures", closeness: "Closeness | None") -> tuple[str, ...]:
    """Return a cell per column, empty where nothing was measured."""
    agreement, chats = (closeness.text, closeness.chats) if closeness else (None, None)
    seconds, quality, speed = figures.quantize_seconds, figures.perplexity, figures.speed
    return (
        figures.name,
        f"{figures.average_bits:.2f}",
        gigabytes(figures.weight_bytes),
        "" if seconds is None else f"{seconds:.1f} s",
        f"{quality.perplexity:.3f}" if quality else "",
        f"{agreement.kl_divergence:.4f}" if agreement else "",
        f"{chats.kl_divergence:.4f}" if chats else "",
        f"{speed.prefill_tokens_per_second:.1f}" if speed else "",
        f"{speed.decode_tokens_per_second:.1f}" if speed else "",
        (", ".join(speed.backends) or "torch") if speed else "",
    )


def _conditions(figures: tuple["ModelFigures", ...]) -> list[str]:
    """Return what the numbers hold for."""
    lines = []
    quality = next((f.perplexity for f in figures if f.perplexity), None)
    if quality is not None:
        lines.append(f"Perplexity: {quality.conditions}.")
    last = figures[-1].perplexity
    if last is not None and last.kv_cache != "auto":
        lines.append(f"The last model sees its keys and values as {last.kv_cache}.")
    speed = next((f.speed for f in figures if f.speed), None)
    if speed is not None:
        lines.append(
            f"Speed: batch 1, prompt {speed.prompt_tokens}, {speed.decode_tokens} tokens decoded, "
            f"median of {speed.repeats}, {speed.threads} threads."
        )
    return lines
