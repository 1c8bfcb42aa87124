"""Two runs into one OUT_DIR: one does it, the other is refused, and nobody loses anything."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.robustness.killing import Answer, Request, contents, server

Ask = Callable[..., list[Answer]]
REFUSALS = (
    "Another run is writing",
    "Pass --overwrite",
    "holds an unfinished run",
    "another recipe",
)


class Pair(NamedTuple):
    first: dict[str, Any]
    second: dict[str, Any]
    start: str
    """What is there: nothing, `unfinished` work, or an `old` checkpoint."""
    wait_ms: int


PLAIN: dict[str, Any] = {}
RESUME = {"resume": True}
OTHER = {"overwrite": True, "num_bits": 3}
OVERWRITE = {"overwrite": True}
PAIRS = [
    Pair(first, second, start, wait_ms)
    for wait_ms, start, (first, second) in product(
        (0, 3, 40, 150, 400),
        ("nothing", "unfinished", "old"),
        ((PLAIN, PLAIN), (RESUME, RESUME), (OTHER, OVERWRITE), (RESUME, OTHER), (OTHER, RESUME)),
    )
]


@pytest.fixture(scope="module")
def model_and_text(llama, text_file) -> tuple[str, str]:
    return str(llama), str(text_file)


@pytest.fixture(scope="module")
def ask(model_and_text, tmp_path_factory) -> Iterator[Ask]:
    out_dir = tmp_path_factory.mktemp("warm") / "out"
    with server(request_of(model_and_text, out_dir)) as function:
        yield function


def request_of(model_and_text: tuple[str, str], out_dir: Path, **changes: Any) -> Request:
    model, text = model_and_text
    return Request(model=model, out_dir=str(out_dir), text=text, **changes)


def check_pair(ask: Ask, pair: Pair, model_and_text: tuple[str, str], tmp_path: Path) -> None:
    wholes = []
    for num_bits in (4, 3):
        whole = tmp_path / f"whole{num_bits}" / "out"
        ask(request_of(model_and_text, whole, num_bits=num_bits))
        wholes.append(contents(whole))
    out_dir = tmp_path / "both" / "out"
    request = request_of(model_and_text, out_dir)
    if pair.start == "unfinished":
        ask(replace(request, die_at=60))
        assert (tmp_path / "both" / "out.partial").is_dir()
    if pair.start == "old":
        ask(request)
    second = replace(request, wait_ms=pair.wait_ms, **pair.second)
    answers = ask(replace(request, **pair.first), second)
    for status, _, message in answers:
        assert status == 0 or any(text in message for text in REFUSALS), message
    assert contents(out_dir) in wholes or pair.start == "unfinished"
    left = {path.name for path in out_dir.parent.iterdir()}
    if any(status == 0 for status, *_ in answers) or pair.start == "old":
        assert left == {"out"}
        assert contents(out_dir) in wholes
    else:  # both were refused: what is there waits for who says what to do with it
        assert (pair.start, pair.first) == ("unfinished", PLAIN)
        assert left == {"out.partial"}


@pytest.mark.parametrize("pair", PAIRS[::11], ids=str)
def test_pair_of_runs(ask, pair, model_and_text, tmp_path):
    check_pair(ask, pair, model_and_text, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_many_pairs_of_runs(ask, pair, model_and_text, tmp_path):
    check_pair(ask, pair, model_and_text, tmp_path)
