"""`qtool grid --tasks`: tasks x models, and what recipes made of them."""

import json

from tests.cli.conftest import Cli, cli

__all__ = ["cli"]  # the fixture

RTN = "version: 1\nweights: {method: rtn, scheme: {num_bits: 3, group_size: 32}}\n"


def test_each_task_is_a_cell_of_each_model_and_of_what_was_made(
    cli: Cli, long_llama, data, text_file, tmp_path
):
    recipe, out = tmp_path / "w3.yaml", tmp_path / "grid"
    recipe.write_text(RTN)
    tasks = ("--tasks", "hellaswag,wikitext", "--data-dir", data)
    text = ("--dataset", text_file, "--windows", "2", "--context-length", "40")
    command = ("grid", out, "--model", long_llama, "--recipe", recipe, *tasks, *text)
    done = cli(*command, "--json", "-")
    assert done.code == 0, done.err
    scores = json.loads(done.out)["scores"]
    names = [(one["recipe"], one["measured"]) for one in scores]
    assert names == [(r, m) for r in (None, "w3.yaml") for m in ("text", "hellaswag", "wikitext")]
    of_text = scores[3]["figures"]
    assert of_text["perplexity"]["original"] == scores[0]["figures"]["perplexity"]["value"]
    assert of_text["closeness"]["text"]["kl_mean"] > 0

    folder = out / long_llama.name
    of_compare = cli("compare", folder, *tasks, "--no-texts", "--json", "-")
    models = json.loads(of_compare.out)["models"]
    assert all(task["cached"] for one in models for task in one["tasks"]["tasks"])
    for number, one in enumerate(models):
        compared = {(r["task"], r["metric"]): r["value"] for r in one["rows"]}
        own = [row for each in scores[3 * number :][:3] for row in each["scores"]]
        assert compared == {(row["task"], row["metric"]): row["value"] for row in own}

    kept = sorted(folder.glob("scores/**/*.json"))
    assert len(kept) == 6
    kept[0].unlink()
    others = [one.stat().st_mtime_ns for one in kept[1:]]
    again = cli(*command, "--json", "-")
    assert [one["scores"] for one in json.loads(again.out)["scores"]] == [
        one["scores"] for one in scores
    ]
    assert [one.stat().st_mtime_ns for one in kept[1:]] == others
    assert kept[0].is_file()
    assert (
        json.loads((folder / "grid.json").read_text())["scores"] == json.loads(again.out)["scores"]
    )
