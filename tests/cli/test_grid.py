"""`qtool grid`: recipes x models, shared among workers."""

import importlib
import json
import shutil

import pytest
import yaml

from qtool.checkpoint.many_results import held
from tests import families
from tests.cli.conftest import Cli


def test_a_grid_keeps_its_cells_and_compare_reads_it(cli: Cli, chat_llama, text_file, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(chat_llama, other)
    measured = {"dataset": str(text_file), "windows": 2, "context_length": 40, "chats": None}
    recipes = []
    for bits in (4, 2):
        weights = {"method": "rtn", "scheme": {"num_bits": bits, "group_size": 32}}
        values = {
            "weights": weights,
            "eval": measured,
            "gates": {"kl_mean": 1e-9 if bits == 2 else 9},
        }
        recipes.append(tmp_path / f"w{bits}.yaml")
        recipes[-1].write_text(yaml.safe_dump({"version": 1, **values}))
    out = tmp_path / "grid"
    command = ["grid", out, "--model", chat_llama, "--model", other, "--engine", "local"]
    command += ["--recipe", recipes[0], "--recipe", recipes[1], "--json", "-"]
    done = cli(*command, "--workers", "2")
    assert done.code == 3, done.err
    cells = json.loads(done.out)["cells"]
    names = [(cell["model"], cell["recipe"], cell["passed"]) for cell in cells]
    models = (chat_llama.name, "other")
    assert names == [(m, f"w{b}.yaml", b == 4) for m in models for b in (4, 2)]
    assert json.loads((out / "grid.json").read_text())["cells"] == cells

    written = (out / "other" / "w4" / "run" / "text.json").stat().st_mtime_ns
    assert cli(*command, "--workers", "1").code == 3
    assert (out / "other" / "w4" / "run" / "text.json").stat().st_mtime_ns == written

    options = ("--windows", "2", "--context-length", "40", "--no-chats", "--dataset", text_file)
    compared = cli("compare", out / "other", *options, "--json", "-")
    assert compared.code == 0, compared.err
    assert len(json.loads(compared.out)["models"]) == 3
    assert "Give the folder of a model" in cli("compare", out).err


def test_a_cell_that_fails_leaves_the_others(cli: Cli, chat_llama, tmp_path):
    fine = tmp_path / "fine.yaml"
    fine.write_text("version: 1\nweights: {method: rtn, scheme: {num_bits: 4, group_size: 32}}\n")
    blocked = tmp_path / "grid" / chat_llama.name / "blocked"
    blocked.mkdir(parents=True)
    (blocked / "letter.txt").write_text("mine")
    shutil.copy(fine, tmp_path / "blocked.yaml")
    command = ("grid", tmp_path / "grid", "--model", chat_llama)
    done = cli(*command, "--recipe", tmp_path / "blocked.yaml", "--recipe", fine)
    assert done.code == 1
    assert "1 of 2 cells failed" in done.err
    assert (tmp_path / "grid" / chat_llama.name / "fine" / "config.json").is_file()
    assert (blocked / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "nothing is asked for"),
        (["--dataset", "wikitext2-test", "--limit", "3"], "--limit needs --tasks"),
        (["--tasks", "arc_easy", "--windows", "3"], "--windows needs --dataset"),
    ],
)
def test_options_that_would_be_ignored_are_refused(cli: Cli, chat_llama, tmp_path, options, said):
    done = cli("grid", tmp_path / "grid", "--model", chat_llama, *options)
    assert done.code == 2
    assert said in done.err


@pytest.fixture
def grid_of(cli: Cli, chat_llama, tmp_path, monkeypatch):
    """Return a function that runs a grid of one cell; what it would measure fails."""
    (tmp_path / "w4.yaml").write_text("version: 1\nweights: {method: rtn, scheme: {num_bits: 4}}\n")
    module = importlib.import_module("qtool.pipeline.grid")
    monkeypatch.setattr(module, "run_recipe", None)

    def run(out_dir, model=chat_llama):
        return cli("grid", out_dir, "--model", model, "--recipe", tmp_path / "w4.yaml")

    return run


def test_tables_of_a_grid_replace_no_file_of_a_user(grid_of, chat_llama, tmp_path):
    for file in (tmp_path / "a/grid.json", tmp_path / "b" / chat_llama.name / "grid.json"):
        file.parent.mkdir(parents=True)
        file.write_text('{"rows": 3}')
        done = grid_of(tmp_path / file.relative_to(tmp_path).parts[0])
        assert (done.code, "grid.json isn't of an earlier run" in done.err) == (1, True), done.err
        assert file.read_text() == '{"rows": 3}'


@pytest.mark.parametrize("name", ["file", "file/x", "dangling", "model", "model/x", "", "x\n"])
def test_a_place_that_takes_no_grid_is_refused_first(name, grid_of, chat_llama, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    shutil.copytree(chat_llama, tmp_path / "model")
    (tmp_path / chat_llama.name).symlink_to("model")
    before = sorted(tmp_path.rglob("*"))
    done = grid_of(f"{tmp_path}/{name}", tmp_path / "model")
    assert (done.code, len(done.said)) == (1, 1), done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_two_grids_do_not_write_one_table(grid_of, tmp_path):
    with held(tmp_path / "grid"):
        assert "Another run is writing" in grid_of(tmp_path / "grid").err
    assert not (tmp_path / "grid").exists()


def test_a_text_that_has_changed_is_measured_anew(cli, llama, tmp_path):
    text, found = tmp_path / "mine.txt", []
    for seed in (1, 2):
        text.write_text(families.text(200, seed=seed))
        options = ("--dataset", text, "--windows", 2, "--context-length", 40, "--json", "-")
        done = cli("grid", tmp_path / "grid", "--model", llama, *options)
        assert done.code == 0, done.err
        found.append(json.loads(done.out)["scores"][0]["figures"]["perplexity"]["value"])
    assert found[0] != found[1]
