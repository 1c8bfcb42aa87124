"""docs/engines.md: the formats of other programs, and what their engines have kernels for."""

from collections.abc import Iterable

from qtool.exchange import exchange_names, load_exchange
from qtool.exchange._engines import ENGINES, Kernels


def page(note: str) -> str:
    """Return the page."""
    parts = [
        "# Formats and engines",
        "",
        note,
        "`qtool export --target` writes formats and `qtool import` reads them; see "
        "[exchange.md](exchange.md).",
        "",
        "| Format | Written | Read | What it is |",
        "|---|---|---|---|",
    ]
    for name in exchange_names():
        exchange = load_exchange(name)
        written, read = (_yes(one is not None) for one in (exchange.write, exchange.read))
        parts.append(f"| `{name}` | {written} | {read} | {exchange.summary} |")
    parts += [
        "",
        "`--engine NAME` refuses before anything is written what that engine has no kernel for. "
        "This is what it looks up:",
        "",
        "| Engine | Format | Bits, symmetric | Bits, asymmetric | Group sizes | Shapes "
        "| Activation order | Inputs of 8 bits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for engine, known in ENGINES.items():
        for target, kernels in known.formats.items():
            parts.append(f"| `{engine}@{known.version}` | `{target}` | {_row(kernels)} |")
    parts += [
        "",
        "The rows of `vllm` were read in its source, not run. Another version may take more or "
        "less; leave out `--engine` and try.",
    ]
    return "\n".join(parts) + "\n"


def _row(kernels: Kernels) -> str:
    if not kernels.group_sizes:
        return "everything | everything | any | any | yes | no"
    sizes = ("row" if size is None else str(size) for size in kernels.group_sizes)
    cells = (
        _list(map(str, kernels.symmetric)),
        _list(map(str, kernels.asymmetric)),
        _list(sizes),
        "any" if kernels.multiple == 1 else f"multiples of {kernels.multiple}",
        _yes(kernels.ordered),
        _yes(kernels.activations),
    )
    return " | ".join(cells)


def _list(texts: Iterable[str]) -> str:
    return ", ".join(texts) or "none"


def _yes(value: bool) -> str:  # noqa: FBT001
    return "yes" if value else "no"
