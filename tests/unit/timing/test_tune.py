"""A tuning table: what is decided of which times, and the file that it becomes."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import BackendError
from qtool.runtime.backends.cuda import selection_file
from qtool.runtime.backends.cuda.selection import H100, Tuning, selection_for
from qtool.scheme import Shape2D
from qtool.timing import tune
from tests.unit.timing.rig import CountingTimer, rig


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path))
    selection_for.cache_clear()
    yield tmp_path
    selection_for.cache_clear()


def seconds(trial):
    """Invent times: 12 warps are best for many weights, 8 for many inputs; 16 can't run."""
    if trial.kernel == "dequantize":
        return 4.5 if trial.num_bits == 4 else 6.5
    if trial.kernel == "lut":
        return 0.5 if math.prod(trial.shape) * trial.num_bits <= 2**25 else 9.0
    if trial.tuning is None:
        return trial.tokens / 16.0
    if trial.tuning.warps == 16:
        return math.inf
    best = 12 if trial.shape == tune.MANY_WEIGHTS else 8
    return 1.0 + abs(trial.tuning.warps - best) + 0.1 * trial.tuning.stages


def test_the_fastest_of_each_is_chosen():
    found = tune.tuned_selection("Imagined 1", H100, seconds)
    assert found.measured_on == "Imagined 1"
    assert found.pairs == Tuning(12, 3)
    assert found.alone == Tuning(8, 2, 2)
    # Of 4 bits up to 4 blocks, of 2 up to 6: neither may be slower than a dequantized weight.
    assert found.most_products == min(4 * 16 * 4, 6 * 16 * 2)
    assert found.most_tokens(4) == 48 and found.most_tokens(2) == 96
    assert found.least_weights == 4096 * 4096
    assert found.prefers_tables(2, Shape2D(4096, 4096))
    assert not found.prefers_tables(4, Shape2D(4096, 4096))
    assert found.wide == H100.wide, "what isn't measured stays"


def test_tables_that_are_never_faster_are_never_chosen():
    slow = lambda trial: 99.0 if trial.kernel == "lut" else seconds(trial)  # noqa: E731
    found = tune.tuned_selection("Imagined 1", H100, slow)
    shapes = [Shape2D(2**n, 4096) for n in range(4, 17)]
    assert not any(found.prefers_tables(bits, shape) for bits in range(1, 9) for shape in shapes)


numbers = st.integers(1, 2**40)
ranges = st.tuples(st.integers(0, 2**30), st.integers(0, 2**30)).map(lambda ends: range(*ends))
tunings = st.builds(
    Tuning, st.integers(1, 32), st.integers(2, 9), st.integers(1, 4), st.integers(1, 8)
)


@given(
    name=st.text(min_size=1, max_size=30),
    numbers=st.tuples(numbers, numbers, numbers),
    tables=ranges,
    wide=st.lists(ranges, min_size=1, max_size=8).map(tuple),
    alone=tunings,
    pairs=tunings,
)
def test_a_selection_is_what_its_file_says(name, numbers, tables, wide, alone, pairs):
    one = replace(
        H100,
        measured_on=name,
        most_products=numbers[0],
        least_weights=numbers[1],
        most_groups=numbers[2],
        tables=tables,
        wide=wide,
        alone=alone,
        pairs=pairs,
    )
    text = json.dumps(selection_file.as_numbers(one))
    assert selection_file.from_numbers(json.loads(text)) == one


def test_the_table_of_a_card_comes_before_those_that_were_shipped(cache):
    assert selection_for("NVIDIA L40S") == H100
    tuned = replace(H100, measured_on="NVIDIA L40S", most_products=96)
    path = selection_file.write_selection(tuned)
    selection_for.cache_clear()
    assert path == cache / "tuning" / "nvidia-l40s.json"
    assert selection_for("NVIDIA L40S") == tuned
    assert selection_for("nvidia-l40S") == H100, "another card, whose file has the same name"
    assert selection_for(H100.measured_on) == H100


DAMAGED = {
    "no json": lambda text: text[:-9],
    "no object": lambda _: "[1]",
    "another version": lambda text: text.replace('"version": 1', '"version": 2'),
    "a number below what can be": lambda text: text.replace('"warps": 16', '"warps": 0'),
    "a number that is none": lambda text: text.replace('"warps": 16', '"warps": "16"'),
    "something unknown": lambda text: text.replace("most_groups", "least_groups"),
    "a ring of one": lambda text: text.replace('"stages": 4', '"stages": 1'),
}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_refused_with_its_place(damage):
    path = selection_file.write_selection(replace(H100, measured_on="NVIDIA L40S"))
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    selection_for.cache_clear()
    with pytest.raises(BackendError, match="--tune") as caught:
        selection_for("NVIDIA L40S")
    assert str(path) in str(caught.value)


def test_a_card_times_each_trial_once_and_what_fails_is_no_choice(monkeypatch):
    small = {
        "MANY_WEIGHTS": Shape2D(64, 256),
        "MANY_INPUTS": Shape2D(32, 512),
        "FEW_WEIGHTS": Shape2D(48, 256),
        "TABLE_SHAPES": (Shape2D(48, 256),),
    }
    for name, value in small.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setattr(tune, "BLOCKS", (2,))
    timer, events, launched = CountingTimer(), [], []  # type: ignore[var-annotated]

    def launch(call, _tensors):
        launched.append((call.file, call.threads, call.shared_bytes))
        if call.threads == 16 * 32:
            raise BackendError("the card refuses")

    result = tune.tune(replace(rig(timer), launch=launch), H100, events.append)
    trials = [trial for trial, _ in result.trials]
    assert len(trials) == len(set(trials)) == len(events)
    assert {trial.kernel for trial in trials} == {"planes", "lut", "dequantize"}
    refused = {t.tuning.warps for t, time in result.trials if t.tuning and math.isinf(time)}
    assert refused == {16}, "the others ran: their tuning reached the launch"
    assert {threads for file, threads, _ in launched if file == "bit_plane_imma"} >= {192, 256, 384}
    assert result.selection.alone.warps != 16
