"""docs/ci.md: the commands of its workflows run, on a tiny model in place of the demo model."""

import shlex

import pytest
import yaml

from qtool.errors import RecipeError
from qtool.recipe.gates import EACH, GATES, MEASUREMENTS
from qtool.recipe.load import load_recipe, recipe_from_mapping
from qtool.recipe.measuring import BenchSection, CheckSection, EvalSection
from qtool.recipe.values import Section
from tests.cli.conftest import Cli
from tests.docs.pages import blocks, command_lines, made_files
from tests.helpers import ROOT

PAGE = ROOT / "docs/ci.md"
SOURCES = [yaml.safe_load(text) for text in blocks(PAGE, "yaml")]
OTHER_PROGRAMS = ("pip install -c ", "git clone https://")
SHORT = {"windows": 1, "context_length": 40}


def own_recipe() -> str:
    """Return the recipe that the page lets its reader write."""
    assert [str(file) for file in made_files(PAGE)] == ["gates.yaml"]
    (found,) = [text for text in blocks(PAGE, "yaml") if "extends:" in text]
    return found


def workflows():
    return [source for source in SOURCES if "jobs" in source or "image" in source.get("gates", {})]


def scripts(workflow) -> list[str]:
    """Return the command lines of a workflow of GitHub, or of a job of GitLab."""
    found = [
        step["run"]
        for job in workflow.get("jobs", {}).values()
        for step in job["steps"]
        if "run" in step
    ]
    found += workflow.get("gates", {}).get("script", [])
    return [line for script in found for line in script.strip().splitlines()]


def ours() -> list[str]:
    lines = [line for workflow in workflows() for line in scripts(workflow)]
    assert [one for one in lines if not one.startswith(("qtool ", *OTHER_PROGRAMS))] == []
    lines = [line for line in lines if line.startswith("qtool ")]
    return [line.replace("${{ matrix.method }}", "rtn") for line in lines]


def test_there_are_workflows_of_both_kinds_with_names_that_their_servers_know():
    github = [one for one in workflows() if "jobs" in one]
    (gitlab,) = [one["gates"] for one in workflows() if "jobs" not in one]
    assert len(github) == 2
    for workflow in github:
        # YAML reads the key `on` as a boolean, and GitHub as it is written
        assert {*workflow} == {"name", True, "jobs"}
        for job in workflow["jobs"].values():
            assert {*job} <= {"runs-on", "timeout-minutes", "strategy", "steps"}
            for step in job["steps"]:
                assert {*step} <= {"name", "uses", "with", "run", "if"}
                assert ("uses" in step) != ("run" in step)
    assert {*gitlab} == {"image", "timeout", "cache", "script", "artifacts"}
    assert len(ours()) == 3


def test_kept_files_are_those_that_the_commands_write():
    for workflow in workflows():
        text = yaml.safe_dump(workflow)
        for line in scripts(workflow):
            words = shlex.split(line)
            if "--junit" in words:
                assert text.count(words[words.index("--junit") + 1]) > 1
                assert f"{words[4]}/run/" in text


@pytest.mark.parametrize("line", ours())
def test_commands_of_workflows_run(cli: Cli, line, chat_llama, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = {"windows": 1, "context_length": 40, "dataset": str(text_file)}
    (tmp_path / "gates.yaml").write_text(own_recipe())
    summary = tmp_path / "step-summary.md"
    summary.touch()
    words = shlex.split(line.replace("$GITHUB_STEP_SUMMARY", str(summary)))[1:]
    words = [str(chat_llama) if word == "demo:smollm2" else word for word in words]
    settings = [f"eval.{key}={value}" for key, value in quick.items()]
    settings += [f"check.{key}={value}" for key, value in SHORT.items() if words[1] == "gates.yaml"]
    settings += ["calibration=null", "weights.scheme.group_size=32", "gates.average_bits=5"]
    done = cli(*words, *(word for text in settings for word in ("--set", text)))
    assert done.code == 0, done.err
    target = tmp_path / words[words.index("--markdown") + 1]
    assert "| gates.average_bits |" in target.read_text()
    if "--junit" in words:
        assert "testcase" in (tmp_path / words[words.index("--junit") + 1]).read_text()
    assert (tmp_path / words[3] / "run" / "run.json").is_file()


def test_the_afternoon_works_from_top_to_bottom(cli: Cli, chat_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gates.yaml").write_text(own_recipe())
    lines = [line.words for line in command_lines(PAGE) if "gates.yaml" in line.words]
    assert len(lines) == 3
    quick = ("weights.scheme.group_size=32", "eval.windows=1", "eval.context_length=40")
    printed = ""
    for words in lines:
        changed = [str(chat_llama) if word == "demo:smollm2" else word for word in words[1:]]
        done = cli(*changed, *(word for text in quick for word in ("--set", text)))
        assert done.code == 0, done.err
        printed = done.out
    assert "gates.perplexity_ratio" in printed
    assert "Kept from an earlier run: check, text, bench." in printed


def test_table_of_gates_is_that_of_the_program():
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    found = {row[0].strip("|` "): row for row in rows if row[1] in ("at most", "at least")}
    assert list(found) == [gate.name for gate in GATES]
    for gate in GATES:
        _, limit, reads, needs = found[gate.name]
        assert limit == ("at least" if gate.at_least else "at most")
        assert reads == gate.summary
        assert ("eval" in needs) == ("'eval'" in MEASUREMENTS[gate.measurement][1])
        assert ("bench" in needs) == ("'bench'" in MEASUREMENTS[gate.measurement][1])


def test_sections_on_the_page_are_valid():
    parts = [part for part in SOURCES if {*part} <= {"gates", "check", "eval", "bench"}]
    parts = [part for part in parts if part not in workflows()]
    assert len(parts) == 2
    gates, sections = parts
    tasks = {"tasks": [*gates["gates"]["score_loss"]]}
    recipe_from_mapping({"weights": {"method": "rtn"}, "eval": tasks, **gates})
    recipe_from_mapping({"weights": {"method": "rtn"}, **sections})


def test_keys_of_the_sections_stand_in_recipes_md():
    text = (ROOT / "docs/recipes.md").read_text().partition("## Measuring")[2]
    sections: dict[str, type[Section]] = {
        "check": CheckSection,
        "eval": EvalSection,
        "bench": BenchSection,
    }
    for name, section in sections.items():
        for key in section.model_fields:
            assert f"`{name}.{key}`" in text or f"`.{key}`" in text, key


@pytest.mark.parametrize("name", ["smoke", "nightly-gpu", "compare-methods"])
def test_recipes_of_ci_have_gates_and_every_side_of_a_comparison_loads(name):
    assert load_recipe(f"ci/{name}").gates
    if name == "compare-methods":
        for method in ("rtn", "gptq", "bcq"):
            assert load_recipe(f"ci/{name}", [f"weights.method={method}"]).gates
        with pytest.raises(RecipeError):
            load_recipe(f"ci/{name}", ["gates.bench=1"])


def test_gate_with_subjects_says_so_in_its_path():
    assert {gate.name for gate in GATES if EACH in gate.reads} == {
        *("kl_mean", "kl_p99", "same_token", "score_loss"),
    }
