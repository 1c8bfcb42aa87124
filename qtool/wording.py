"""How messages show what comes from elsewhere: on one line, printable, of bounded length."""

from collections.abc import Iterable, Mapping

LONGEST_REASON = 300
MOST_CHARACTERS = 200
LONGEST_VALUE = 60
NUM_LISTED = 3
SMALL = 1e-3
ROUNDS_UP = 999.5
"""To a thousand, of which three digits have a power of ten."""


def reason(error: BaseException) -> str:
    """Return what an exception of a library says, without its full stop."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def shown(name: object) -> str:
    """Return a name out of a file; what is no text, or can't be seen, as Python writes it."""
    is_seen = isinstance(name, str) and name.isprintable() and bool(name.strip())
    text = str(name) if is_seen else ascii(name)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def quoted(value: object) -> str:
    """Return a value as Python writes it; never fails."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of more than 4,300 digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 4]}...{text[-1]}"


def list_names(names: Iterable[str]) -> str:
    """Return the first few names and how many more there are."""
    texts = [shown(name) for name in names]
    more = len(texts) - NUM_LISTED
    return ", ".join(texts[:NUM_LISTED]) + (f" and {more} more" if more > 0 else "")


def first_alike(reasons: Mapping[str, str]) -> tuple[list[str], str]:
    """Return, of reasons by name, the names that have the first one, and that."""
    reason = next(iter(reasons.values()))
    return [name for name in reasons if reasons[name] == reason], reason


def gigabytes(num_bytes: float) -> str:
    """Return a size as people write it."""
    for unit, size in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9)):
        if num_bytes < ROUNDS_UP * size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e9:.0f} GB"


def with_error(value: float, error: float | None = None, *, percent: bool = False) -> str:
    """Return a number, with ± its standard error; small ones by their power of ten."""
    scale, digits = (100, 2) if percent else (1, 4)
    shown = _digits(scale * value, digits)
    if error is not None:
        shown += f" ± {_digits(scale * error, digits)}"
    return shown + (" %" if percent else "")


def _digits(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < SMALL else f"{value:.{digits}f}"
