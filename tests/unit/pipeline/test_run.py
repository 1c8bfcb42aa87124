"""A recipe from beginning to end: measured, judged, killed anywhere and carried on."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qtool import pipeline
from qtool.checkpoint.marks import REPORT_NAME, RUN_FOLDER, RUN_NAMES, foreign_entries, read_report
from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import CheckpointError, DataError, OutputError
from qtool.modeling.locate import Location
from qtool.pipeline.kept_steps import KeptSteps, contents_of
from qtool.pipeline.run_figures import bench_figures, score_figures
from qtool.recipe.gates import GATES
from qtool.recipe.load import recipe_from_mapping
from qtool.report.verdict import judge
from tests import families

running: Any = sys.modules["qtool.pipeline.run"]
resulting: Any = sys.modules["qtool.pipeline.run_result"]
quantizing: Any = sys.modules["qtool.pipeline.quantize"]
checking: Any = sys.modules["qtool.pipeline.check_budgets"]
TIMED = ("gates.seconds", "gates.quantize_seconds", "gates.peak_memory")
ELSEWHERE = ("score_loss", "copy_share", "card_memory")
"""They need lm-eval, or a card."""
HERE = {gate.name: gate for gate in GATES if gate.name not in ELSEWHERE}
OF_SPEED = ("gates.prefill_ratio", "gates.decode_ratio")


def full(text_file) -> dict[str, Any]:
    """Return a recipe with all gates that can be judged here, wide open."""
    windows = {"windows": 2, "context_length": 40}
    return {
        "weights": {"method": "rtn", "scheme": {"num_bits": 4, "group_size": 32}},
        "check": {"max_kl": 1, "max_fallbacks": 0, **windows},
        "eval": {"dataset": str(text_file), **windows},
        "bench": {},
        "gates": {name: 0.0 if gate.at_least else 1e12 for name, gate in HERE.items()},
    }


@pytest.fixture
def values(text_file):
    return full(text_file)


@pytest.fixture
def recipe(values):
    return recipe_from_mapping(values)


@pytest.fixture(scope="module")
def whole(chat_llama, text_file, tmp_path_factory):
    """Return the result of an unbroken run."""
    out_dir = tmp_path_factory.mktemp("whole") / "out"
    return run(chat_llama, out_dir, recipe_from_mapping(full(text_file)))


def run(model, out_dir, recipe, **options):
    settings = running.RunOptions(**options)
    return pipeline.run_recipe(Location(model), out_dir, recipe, settings, title="mine")


def report(out_dir) -> dict[str, Any]:
    return json.loads((out_dir / RUN_FOLDER / "run.json").read_text())


def comparable(result):
    """Return the lines without what differs from run to run."""
    lines = (replace(line, value=0) if line.gate in OF_SPEED else line for line in result.gates)
    return [line for line in lines if line.gate not in TIMED]


def test_every_gate_reads_a_figure_and_all_results_are_kept(chat_llama, tmp_path, recipe):
    result = run(chat_llama, tmp_path / "out", recipe)
    assert result.passed
    assert all(line.value is not None for line in result.gates)
    judged = {line.gate.removeprefix("gates.") for line in result.gates}
    assert judged >= {*recipe.gates, "check.max_kl", "check.max_fallbacks"}
    folder = tmp_path / "out" / RUN_FOLDER
    assert {path.name for path in folder.iterdir()} == {*RUN_NAMES} - {"tasks.json"}
    assert report(tmp_path / "out")["passed"] is True
    assert foreign_entries(tmp_path / "out") == []


def test_checkpoint_is_that_of_quantize_and_records_no_gates(chat_llama, tmp_path, recipe):
    run(chat_llama, tmp_path / "a", recipe)
    pipeline.quantize(Location(chat_llama), tmp_path / "b", recipe.without_measuring())
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "gates" not in CheckpointReader(tmp_path / "a").manifest.recipe


def test_failed_gate_is_named_and_all_is_kept(chat_llama, tmp_path, recipe):
    failing = recipe.model_copy(update={"gates": {**recipe.gates, "bytes": 5.0}})
    result = run(chat_llama, tmp_path / "out", failing)
    assert [line.name for line in result.gates if not line.passed] == ["gates.bytes"]
    assert report(tmp_path / "out")["passed"] is False
    assert "1 of" in (tmp_path / "out" / RUN_FOLDER / "summary.md").read_text()
    assert 'failures="1"' in (tmp_path / "out" / RUN_FOLDER / "junit.xml").read_text()
    again = run(chat_llama, tmp_path / "out", recipe)  # other limits need no other measurement
    assert again.passed
    assert again.reused == ("check", "text", "bench")


def test_texts_and_data_that_have_changed_are_measured_anew(chat_llama, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text(families.text(400))
    values = {**full(text), "gates": {}, "bench": None, "check": None}
    recipe = recipe_from_mapping({key: value for key, value in values.items() if value is not None})
    found = []
    for content in (families.text(400), families.text(400, seed=9), families.text(400, seed=9)):
        text.write_text(content)
        result = run(chat_llama, tmp_path / "out", recipe)
        kept = json.loads((tmp_path / "out" / RUN_FOLDER / "text.json").read_text())
        found.append((result.reused, kept["result"]))
    assert [reused for reused, _ in found] == [(), (), ("text",)]
    assert found[0][1] != found[1][1] == found[2][1]


def test_contents_tell_files_of_the_same_name_apart(tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    file, places = (
        tmp_path / "data" / "deep" / "a.jsonl",
        (tmp_path / "data", "wikitext2-test", None),
    )
    digests = []
    for content in ("one", "two", "one"):
        file.write_text(content)
        digests.append(contents_of(*places))
    assert digests[0] == digests[2] != digests[1]
    assert list(digests[0]) == [str(tmp_path / "data")]


def raises_once(monkeypatch, module, name):
    """Let a function of a module fail at its first call."""
    before = getattr(module, name)
    calls = []

    def once(*arguments, **options):
        calls.append(name)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return before(*arguments, **options)

    monkeypatch.setattr(module, name, once)


@pytest.mark.parametrize(
    ("module", "name", "reused"),
    [
        (quantizing, "solve", ()),
        (quantizing, "write_result", ()),
        (running, "open_source", ()),
        (checking, "budget_lines", ()),
        (checking, "write_json_file", ()),
        (running, "evaluate", ("check",)),
        (running, "text_report", ("check",)),
        (running, "bench", ("check", "text")),
        (resulting, "sizes_of", ("check", "text", "bench")),
        (running, "write_verdict", ("check", "text", "bench")),
    ],
)
def test_killed_anywhere_it_goes_on_to_the_same_verdict(
    chat_llama, tmp_path, recipe, whole, monkeypatch, module, name, reused
):
    raises_once(monkeypatch, module, name)
    with pytest.raises(KeyboardInterrupt):
        run(chat_llama, tmp_path / "out", recipe)
    result = run(chat_llama, tmp_path / "out", recipe)
    assert result.reused == reused
    assert comparable(result) == comparable(whole)
    once_more = run(chat_llama, tmp_path / "out", recipe)
    assert once_more.gates == result.gates, "times are kept as well"


@pytest.mark.parametrize(
    "damage", ["", "{", "[1]", '{"result": {}}', '{"made of": 1, "result": 2}']
)
def test_damaged_result_of_a_step_is_made_anew(tmp_path, damage):
    keep = KeptSteps(tmp_path)
    (tmp_path / "text.json").write_text(damage)
    assert not keep.once("text", {"a": 1}, lambda: {"found": 1}).is_reused
    kept = keep.once("text", {"a": 1}, lambda: pytest.fail("made again"))
    assert kept.is_reused
    assert kept.result == {"found": 1}
    assert not keep.once("text", {"a": 2}, lambda: {"found": 2}).is_reused


def test_result_with_failures_is_made_anew(tmp_path):
    keep = KeptSteps(tmp_path)
    keep.once("tasks", {}, lambda: {"failures": ["no data"]})
    assert not keep.once("tasks", {}, lambda: {"failures": []}).is_reused
    assert keep.once("tasks", {}, lambda: pytest.fail("made again")).is_reused


def test_other_checkpoint_is_measured_anew_and_replaced_only_if_asked(
    chat_llama, tmp_path, values, recipe
):
    run(chat_llama, tmp_path / "out", recipe)
    values["weights"]["scheme"]["num_bits"] = 3
    other = recipe_from_mapping(values)
    with pytest.raises(OutputError, match="--overwrite"):
        run(chat_llama, tmp_path / "out", other)
    result = run(chat_llama, tmp_path / "out", other, overwrite=True)
    assert result.reused == ()
    assert read_report(tmp_path / "out")["check"]["passed"]


def test_other_windows_are_measured_anew(chat_llama, tmp_path, recipe):
    run(chat_llama, tmp_path / "out", recipe)
    fewer = recipe.eval.model_copy(update={"windows": 1})
    result = run(chat_llama, tmp_path / "out", recipe.model_copy(update={"eval": fewer}))
    assert result.reused == ("check", "bench")


def test_without_a_baseline_only_the_result_is_measured(llama, tmp_path, values):
    values |= {"gates": {"perplexity": 1e9}, "check": None, "bench": None}
    values["eval"] |= {"baseline": False}
    result = run(llama, tmp_path / "out", recipe_from_mapping(values))
    assert result.passed
    assert set(result.figures) == {"size", "cost", "perplexity"}


def test_chats_that_cannot_be_compared_fail_a_limit_for_all(llama, tmp_path, values):
    values |= {"gates": {"kl_mean": 10}, "bench": None}
    result = run(llama, tmp_path / "out", recipe_from_mapping(values))
    by_name = {line.name: line for line in result.gates}
    assert by_name["gates.kl_mean (text)"].passed
    assert "no chat template" in by_name["gates.kl_mean (chats)"].note
    assert "check.max_kl (chats)" not in by_name, "a model without a template has no chats"


def test_text_that_is_missing_is_found_before_anything_is_done(llama, tmp_path, values):
    values["eval"]["dataset"] = "no-such.txt"
    values["gates"] = {}
    with pytest.raises(DataError, match=r"no-such\.txt"):
        run(llama, tmp_path / "out", recipe_from_mapping(values))
    assert not (tmp_path / "out").exists()


def test_files_that_changed_after_writing_fail_the_check(chat_llama, tmp_path, recipe):
    plain = recipe.model_copy(update={"check": None, "eval": None, "bench": None, "gates": {}})
    run(chat_llama, tmp_path / "out", plain)
    weights = tmp_path / "out" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="what was written"):
        run(chat_llama, tmp_path / "out", recipe)


@pytest.mark.parametrize(
    ("budget", "failed"), [({"max_kl": 1e-9}, ["text", "chats"]), ({"max_kl": 1}, [])]
)
def test_check_marks_the_result_and_keeps_it(chat_llama, tmp_path, values, budget, failed):
    values["check"] |= budget
    chosen = recipe_from_mapping({**values, "gates": {}})
    out_dir = tmp_path / "out"
    result = pipeline.quantize(Location(chat_llama), out_dir, chosen, check=True)
    assert [line.of for line in result.budgets if not line.passed] == failed
    mark = read_report(out_dir)["check"]
    assert mark["passed"] == (not failed)
    assert len(mark["failed"]) == len(failed)
    assert result.check is not None
    assert result.check.text is not None
    assert mark["text"]["kl_divergence"] == result.check.text.kl_divergence
    assert mark["fallbacks"] == 0
    CheckpointReader(out_dir).verify()
    again = pipeline.quantize(Location(chat_llama), out_dir, chosen, check=True, resume=True)
    assert again.budgets == result.budgets


def test_fallbacks_are_counted(chat_llama, tmp_path, values):
    values["check"] = {"max_fallbacks": 1, "windows": 1, "context_length": 40}
    chosen = recipe_from_mapping({**values, "gates": {}})
    out_dir = tmp_path / "out"
    pipeline.quantize(Location(chat_llama), out_dir, chosen)
    found = read_report(out_dir)
    for layer in found["layers"][:2]:
        layer["fallback"] = "it was rounded"
    (out_dir / REPORT_NAME).write_text(json.dumps(found))
    result = pipeline.quantize(Location(chat_llama), out_dir, chosen, check=True, resume=True)
    (line,) = result.budgets
    assert (line.value, line.passed) == (2, False)


def test_original_that_cannot_be_compared_fails_max_kl(chat_llama, tmp_path, values, monkeypatch):
    monkeypatch.setattr(sys.modules["qtool.pipeline.check"], "room", lambda _device: 1000)
    chosen = recipe_from_mapping({**values, "gates": {}})
    result = pipeline.quantize(Location(chat_llama), tmp_path / "out", chosen, check=True)
    assert [line.value for line in result.budgets] == [None, None, 0]
    assert read_report(tmp_path / "out")["check"]["passed"] is False


KERNELS = {
    "copy_gb_per_second": 4000.0,
    "layers": [
        {"count": 2, "rows": [{"microseconds": 10.0, "weight_bytes": 20_000_000}, {}]},
        {"count": 1, "rows": [{"microseconds": 20.0, "weight_bytes": 40_000_000}, {}]},
    ],
    "end_to_end": [
        {
            "name": name,
            "prefill_tokens_per_second": 100.0 * speed,
            "decode_tokens_per_second": 10.0 * speed,
            "peak_memory_bytes": 1000 * speed,
        }
        for name, speed in (("out", 3), ("original", 2))
    ],
    "not_run": {},
}


NAMES = {"result": "out", "original": "original"}


def test_figures_of_a_card_are_those_that_gates_read():
    figures = bench_figures({"kernels": KERNELS, **NAMES})
    assert figures["kernels"]["copy_share"] == pytest.approx(80e6 / 40e-6 / 4e12)
    assert figures["kernels"]["memory_bytes"] == 3000
    assert figures["speed"]["decode_ratio"] == 1.5
    limits = {"copy_share": 0.5, "card_memory": 3000, "prefill_ratio": 1.5}
    values = {"weights": {"method": "rtn"}, "bench": {"gpu": True}, "gates": limits}
    assert all(line.passed for line in judge(recipe_from_mapping(values), figures))


def test_model_that_was_not_timed_says_why():
    ours = KERNELS["end_to_end"][:1]  # type: ignore[index]
    kernels = {
        **KERNELS,
        "end_to_end": ours,
        "not_run": {"original": "too large", "GemLite": "not here"},
    }
    figures = bench_figures({"kernels": kernels, **NAMES})
    values = {"weights": {"method": "rtn"}, "bench": {"gpu": True}, "gates": {"decode_ratio": 1}}
    (line,) = judge(recipe_from_mapping(values), figures)
    assert not line.passed
    assert line.note == "original: too large"
    assert figures["kernels"]["memory_bytes"] == 3000


def test_loss_of_a_score_has_the_sign_of_its_metric():
    row = {"filter": "none", "headline": True, "paired": None, "verdict": ""}
    rows = [
        {**row, "asked": "arc", "task": "arc", "metric": "acc", "higher_is_better": True}
        | {"value": 0.4, "original": 0.5},
        {**row, "asked": "wiki", "task": "wiki", "metric": "ppl", "higher_is_better": False}
        | {"value": 12.0, "original": 10.0},
        {**row, "asked": "g", "task": "sub", "metric": "em", "higher_is_better": True}
        | {"value": 0.5, "original": 0.4, "filter": "strict"},
    ]
    scores = score_figures({"rows": rows, "failures": []})["scores"]
    losses = {name: one["loss"] for name, one in scores.items()}
    assert losses == pytest.approx({"arc acc": 0.1, "wiki ppl": 2.0, "g sub em strict": -0.1})


def test_overwrite_replaces_what_a_run_left_and_nothing_else(llama, tmp_path, values):
    quick = recipe_from_mapping({"weights": values["weights"]})
    folder = tmp_path / "out" / RUN_FOLDER
    run(llama, tmp_path / "out", quick)
    half = folder / "text.json.0123456789ab.partial"
    half.write_text("{")
    assert foreign_entries(tmp_path / "out") == []
    run(llama, tmp_path / "out", quick, overwrite=True)
    assert not half.exists()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"didn't write: run/notes\.txt"):
        run(llama, tmp_path / "out", quick, overwrite=True)
    assert (folder / "notes.txt").is_file()


def test_directory_that_one_stands_in_takes_a_run(llama, tmp_path, values, monkeypatch):
    quick = recipe_from_mapping({"weights": values["weights"], "gates": {"average_bits": 5}})
    monkeypatch.chdir(tmp_path)
    for options in ({}, {}, {"overwrite": True}):
        assert run(llama, Path(), quick, **options).passed
        assert (tmp_path / RUN_FOLDER / "run.json").is_file()
