"""Recipes that people, editors and enemies write: a plan, or one line."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from qtool.modeling.locate import Location
from qtool.modeling.source import ModelSource, open_source
from qtool.recipe.load import load_recipe, recipe_from_mapping
from qtool.steps.plan import make_plan
from tests.robustness.child import run_apart
from tests.robustness.fuzzing import fuzz, sizes
from tests.robustness.values import DEEP, HUGE, changed_trees, damaged, one_of_two

SCHEME = {"num_bits": 4, "group_size": 32, "group_dim": "in_features", "symmetric": False}
FULL: dict[str, Any] = {
    "version": 1,
    "description": "all keys",
    "calibration": {
        "dataset": "wikitext2-valid",
        "num_samples": 64,
        "sequence_length": "match",
        "tasks": ["mmlu"],
        "num_tokens": 131072,
        "holdout": 0.1,
        "token_cap": 8.0,
        "input_error": "auto",
        "residual_error": True,
        "dtype": "auto",
        "cache": "memory",
        "strict": False,
    },
    "weights": {
        "method": "gptq",
        "scheme": SCHEME,
        "options": {"damping": 0.01},
        "choose": {"group_dim": ["in_features", "out_features"]},
        "overrides": [
            {"match": "*.down_proj", "method": "bcq", "scheme": {"num_bits": 3}, "options": {}},
            {"match": "*.0.*", "skip": True},
        ],
    },
    "embedding": {"method": "rtn", "scheme": SCHEME, "options": {}},
    "head": {"method": "rtn", "scheme": {"num_bits": 8}, "options": {}},
    "seed": 3,
}
SMALL: dict[str, Any] = {"weights": {"method": "rtn", "scheme": {"num_bits": 4, "group_size": 32}}}
SNIPPETS = (
    *("!!bool abc", "!!int abc", "!!float abc", "!!timestamp abc", "!!binary ///", "!!null x"),
    *("2001-99-99", "2001-02-30", "2001-01-01", "12:30:45", "0o9", "0x", "1_000", "1e999", ".nan"),
    *(".inf", "-.inf", "~", "yes", "NO", "=", "<<", "@x", "`x`", "%x", "!x", "!!x", "! x", "&a"),
    *("&a [*a]", "*nobody", "&a {<<: *a}", "{<<: 5}", "{<<: [{a: 1}]}", "{<<: {num_bits: 3}}"),
    *("!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!str 5", "!!seq x", "!!map x"),
    *("!!python/object/apply:os.system [ls]", "!!python/name:os.system", "{? [a]: b}", "{1: 2}"),
    *("{null: 1}", "{[a]: 1}", "{true: 1}", "|", ">-", "'", '"', '"\\ud83d"', '"\\x00"', '"\\U'),
    *("[", "{", "]", "- x", "\t", "a: b: c", "#", "...", "---", "%YAML 9.9", "[" * 3000),
    *("[" * 40 + "]" * 40, "[" * 3000 + "]" * 3000, "{a: " * 3000 + "}" * 3000, "- " * 3000),
    *("9" * 5000, "-" + "9" * 5000, "0x" + "f" * 9000, "0." + "9" * 5000, "[" + "x," * 99999 + "]"),
)
LAUGHS = "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)
DOCUMENTS = (
    *("", "\n", "null", "[]", "text", "5", "---\n---\n", "weights:\n", "weights: {}\n", "\t"),
    *("weights: {method: rtn}\nextends: rtn-w4g128\n", "extends: self.yaml\n", "extends: .\n"),
    *("extends: /dev/zero\n", "extends: ''\n", "extends: 5\n", "extends: [rtn-w4g128]\n"),
    *("extends: no/such.yaml\n", "extends: rtn-w4g12\n", "extends: '../x'\n", "extends: ~\n"),
    *(f"a: &a [x,x]\n{LAUGHS}weights: {{method: rtn}}\n", f"weights: &a [x,x]\n{LAUGHS}"),
    *("weights: {method: rtn, method: bcq}\n", "weights: {method: rtn}\n<<: {seed: 3}\n"),
    *("weights: &w {method: rtn}\nembedding: *w\n", "weights: {<<: &x {<<: *x}, method: rtn}\n"),
)
KEYS = (
    *("seed", "weights", "weights.method", "weights.scheme.num_bits", "weights.scheme.group_size"),
    *("weights.options.damping", "weights.overrides", "weights.overrides.0.match", "calibration"),
    *(
        "calibration.num_samples",
        "calibration.tasks",
        "embedding",
        "",
        ".",
        "a..b",
        "x",
        "weights.",
    ),
)
VALUES = ("3", "", "null", "[]", "{}", "rtn", "bcq", "-1", "1.5", "[{match: '*', skip: true}]")


@dataclass(frozen=True, slots=True)
class Case:
    """A recipe and what `--set` says; `what` is short."""

    what: str
    content: bytes
    settings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"{self.what[:200]} --set {self.settings!r:.200}"


def yaml_bytes(tree: Any) -> bytes:
    """Return a tree as YAML; a string '@yaml N@' stands for a snippet that isn't plain data."""
    text = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False, width=10**6)
    for number, snippet in enumerate(SNIPPETS):
        text = text.replace(f"'@yaml {number}@'", snippet)
    text = text.replace(f"'{DEEP}'", "[" * 3000 + "]" * 3000).replace(f"'{HUGE}'", "9" * 5000)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def changed(draw: st.DrawFn) -> Case:
    """Draw a recipe with values of other types, unknown keys, missing keys."""
    what, tree = draw(changed_trees(draw(st.sampled_from([FULL, SMALL]))))
    return Case(what, yaml_bytes(tree))


@st.composite
def with_snippet(draw: st.DrawFn) -> Case:
    """Draw a recipe with odd YAML in place of one value."""
    number = draw(st.integers(0, len(SNIPPETS) - 1))
    tree = copy.deepcopy(draw(st.sampled_from([FULL, SMALL])))
    section = draw(st.sampled_from([tree, tree["weights"], tree["weights"]["scheme"]]))
    key = draw(st.sampled_from([*section, "x"]))
    section[key] = f"@yaml {number}@"
    return Case(f"{key}: {SNIPPETS[number][:80]}", yaml_bytes(tree))


@st.composite
def with_settings(draw: st.DrawFn) -> Case:
    """Draw what `--set` can say."""
    texts = st.builds(
        "{}{}{}".format,
        st.sampled_from(KEYS),
        st.sampled_from(["=", "=", "=", "", " = ", "=="]),
        st.sampled_from([*VALUES, *SNIPPETS]),
    )
    settings = draw(st.lists(texts, min_size=1, max_size=3))
    return Case("a small recipe", yaml_bytes(SMALL), tuple(settings))


@st.composite
def with_damage(draw: st.DrawFn) -> Case:
    """Draw a recipe whose bytes were damaged, and whole odd documents."""
    good = draw(st.sampled_from([yaml_bytes(FULL), yaml_bytes(SMALL)]))
    what, content = draw(damaged(good))
    odd = draw(st.sampled_from([None, None, *DOCUMENTS]))
    return Case(what, content) if odd is None else Case(odd[:120], odd.encode())


CASES = one_of_two(changed() | with_snippet(), with_settings() | with_damage())


@pytest.fixture(scope="module")
def source(llama):
    opened = open_source(Location(llama))
    make_plan(opened, recipe_from_mapping(SMALL))  # imports what the children need
    make_plan(opened, recipe_from_mapping(FULL))
    return opened


def plan(case: Case, file: Path, source: ModelSource) -> str | None:
    """Read a recipe, plan with it, and return what is wrong with it although it was taken."""
    file.write_bytes(case.content)
    recipe = load_recipe(str(file), case.settings)
    make_plan(source, recipe)  # options are checked here
    values = recipe.model_dump(mode="json")
    text = json.dumps(values, allow_nan=False)  # as the manifest will have it
    if recipe_from_mapping(json.loads(text)) != recipe:
        return "is another recipe when it is read back from the manifest"
    return None


@sizes(140)
def test_a_recipe_gives_a_plan_or_one_line(size, source, tmp_path):
    file = tmp_path / "self.yaml"

    def check(case: Case) -> str | None:
        outcome = run_apart(plan, case, file, source)
        return outcome.complaint or outcome.value

    fuzz(CASES, check, size)
