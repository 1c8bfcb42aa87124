import pytest
import yaml

from qtool.errors import RecipeError
from qtool.recipe.load import load_recipe, merge, recipe_from_mapping
from qtool.recipe.names import built_in, find_recipe
from qtool.recipe.schema import resolve
from tests.helpers import run_python

MINIMAL = "weights:\n  method: rtn\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function (text, name) -> name of a recipe in the working directory."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str, name: str = "r.yaml") -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return write_file


def refused(source: str, match: str, overrides: tuple[str, ...] = ()) -> None:
    with pytest.raises(RecipeError, match=match) as caught:
        load_recipe(source, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "weights:\n  method: rtn\n  scheme:\n    num_bitz: 3\n",
            r"No 'num_bitz' in weights\.scheme\. Did you mean 'num_bits'\? .*\(r\.yaml line 4\)",
        ),
        (MINIMAL + "wieghts: {}\n", r"No 'wieghts' in the recipe\. Did you mean .* line 3\)"),
        (
            "weights:\n  method: rtn\n  overrides:\n    - {match: '*'}\n    - {macth: '*'}\n",
            r"weights\.overrides\.1.*r\.yaml line 5",
        ),
        (MINIMAL + "embedding:\n  bits: 3\n", r"No 'bits' in embedding.*line 4"),
    ],
)
def test_unknown_key_names_path_line_and_nearest_key(write, text, message):
    refused(write(text), message)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("{num_bits: 9}", r"weights\.scheme\.num_bits is 9; it should be less than .*8"),
        ("{num_bits: 0}", "num_bits is 0"),
        ("{num_bits: 2.5}", r"num_bits is 2\.5"),
        ("{num_bits: true}", "num_bits is True; is a boolean"),
        ("{num_bits: null}", "num_bits is None"),
        ("{num_bits: [4]}", "num_bits is"),
        ("{group_size: 0}", "group_size is 0"),
        ("{group_size: -1}", "group_size is -1"),
        ("{group_size: true}", "group_size is True"),
        ("{group_dim: rows}", "group_dim is 'rows'; it should be 'in_features' or 'out_features'"),
        ("{symmetric: maybe}", "symmetric is 'maybe'"),
        ("4", "scheme is 4"),
        ("null", "scheme is None"),
    ],
)
def test_impossible_value_names_path_value_and_line(write, scheme, message):
    refused(write(f"weights:\n  method: rtn\n  scheme: {scheme}\n"), f"{message}.*line 3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping with the key 'weights'"),
        ("- 1\n", "must be a mapping"),
        ("just text\n", "must be a mapping"),
        ("weights: {\n", r"r\.yaml line 2 isn't valid YAML"),
        ("weights:\n\tmethod: rtn\n", r"line 2 isn't valid YAML"),
        ("weights: !!python/object:os.system {}\n", "isn't valid YAML"),
        ("a: 1\n---\nb: 2\n", "isn't valid YAML"),
        ("description: x\n", r"weights is missing"),
        ("weights: {}\n", r"weights\.method is missing \(r\.yaml line 1\)"),
        (MINIMAL + "version: 2\n", "version is 2"),
        (MINIMAL + "seed: true\n", "seed is True"),
        (MINIMAL + "? [a, b]\n: 1\n", r"\(r\.yaml line 3\)|isn't valid YAML"),
        (MINIMAL + "3: 4\n", "3"),
    ],
)
def test_broken_document_is_one_sentence(write, text, message):
    refused(write(text), message)


def test_file_that_is_no_text_is_one_sentence(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00weights")
    refused(str(tmp_path / "r.yaml"), r"r\.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (MINIMAL + "weights:\n  method: bcq\n", 3),
        ("weights:\n  method: rtn\n  method: bcq\n", 3),
        ("weights: {method: rtn, scheme: {num_bits: 3, num_bits: 4}}\n", 1),
    ],
)
def test_key_given_twice_is_an_error(write, text, line):
    refused(write(text), rf"is given twice \(r\.yaml line {line}\)")


def test_extends_lays_one_recipe_over_another(write):
    write("weights: {method: rtn, scheme: {num_bits: 4, group_size: 64}}\nseed: 5\n", "base.yaml")
    recipe = load_recipe(write("extends: base.yaml\nweights:\n  scheme: {num_bits: 3}\n"))
    assert recipe.weights.method == "rtn"
    assert recipe.weights.scheme.num_bits == 3
    assert recipe.weights.scheme.group_size == 64
    assert recipe.seed == 5


def test_extends_takes_built_in_names_and_paths_from_its_own_folder(write):
    assert load_recipe(write("extends: rtn-w4g128\n")).weights.method == "rtn"
    write(MINIMAL, "below/base.yaml")
    assert load_recipe(write("extends: base.yaml\n", "below/top.yaml")).weights.method == "rtn"


def test_error_in_the_extended_recipe_names_its_file_and_line(write):
    write("weights:\n  method: rtn\n  scheme: {num_bits: 99}\n", "base.yaml")
    refused(write("extends: base.yaml\n"), r"num_bits is 99.*base\.yaml line 3")


@pytest.mark.parametrize(
    "files",
    [
        {"r.yaml": "extends: r.yaml\n"},
        {"r.yaml": "extends: b.yaml\n", "b.yaml": "extends: r.yaml\n"},
        {"r.yaml": "extends: ./b.yaml\n", "b.yaml": "extends: ./r.yaml\n"},
        {"r.yaml": "extends: below/../r.yaml\n", "below/x.yaml": ""},
    ],
)
def test_circle_of_extends_is_found(write, files):
    for name, text in files.items():
        write(text, name)
    refused("r.yaml", r"extend each other in a circle: .*r\.yaml")


@pytest.mark.parametrize("parent", ["[a, b]", "3", "nothing.yaml", "rtn-w4g12", "''"])
def test_extends_that_names_nothing_is_refused(write, parent):
    refused(write(f"extends: {parent}\n"), "extends is|No recipe file|No '.*' in built-in recipes")


def test_set_changes_any_key_and_makes_sections(write):
    recipe = load_recipe(
        write(MINIMAL),
        [
            "weights.scheme.num_bits=3",
            "weights.scheme.group_size=null",
            "weights.options.clip_ratio = 0.9",
            "embedding.scheme.num_bits=2",
            "seed=7",
            "description=a=b",
        ],
    )
    assert (recipe.weights.scheme.num_bits, recipe.weights.scheme.group_size) == (3, None)
    assert recipe.weights.options == {"clip_ratio": 0.9}
    assert recipe.embedding is not None
    assert recipe.embedding.scheme.num_bits == 2
    assert (recipe.seed, recipe.description) == (7, "a=b")


def test_last_set_wins(write):
    assert load_recipe(write(MINIMAL), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("text", ["", "=3", "seed", "a..b=1", ".seed=1", "seed.=1", " =1"])
def test_set_that_is_no_assignment_is_refused(write, text):
    refused(write(MINIMAL), r"isn't an assignment\. Write --set a\.b=value", (text,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights.scheme.num_bits=many", r"num_bits is 'many'.*\(--set weights\.scheme"),
        ("weights.scheme.num_bitz=3", r"Did you mean 'num_bits'.*\(--set"),
        ("seed={", "the value isn't valid YAML"),
        ("weights=3", "weights is 3"),
        ("seed=", "seed is None"),
        ("weights.overrides.0.skip=true", r"'0' is no key, and there is no list.*\(--set weights"),
        ("seed=2001-99-99", "seed is '2001-99-99'"),
    ],
)
def test_impossible_set_is_named(write, text, message):
    refused(write(MINIMAL), message, (text,))


def test_built_in_names_are_found_and_misses_suggest_the_nearest():
    assert "rtn-w4g128" in built_in()
    assert find_recipe("rtn-w4g128").is_file()
    refused("rtn-w4g12", r"Did you mean 'rtn-w4g128'\?.*path, ending in \.yaml")
    refused("no/such.yaml", r"No recipe file no/such\.yaml")


@pytest.mark.parametrize("name", ["../rtn-w4g128", "", "/etc/passwd"])
def test_name_cannot_leave_the_folder_of_recipes(name):
    refused(name, "in built-in recipes")


@pytest.mark.parametrize("name", built_in())
def test_recipe_survives_being_written_down_and_read_again(name):
    recipe = load_recipe(name)
    dumped = yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True)))
    assert recipe_from_mapping(dumped) == recipe


def test_recorded_override_keeps_an_unset_group_size():
    override = {"match": "*", "scheme": {"group_size": None}}
    recipe = recipe_from_mapping({"weights": {"method": "rtn", "overrides": [override]}})
    again = recipe_from_mapping(recipe.model_dump(mode="json", exclude_defaults=True))
    section = resolve(again.weights, "any")
    assert section is not None
    assert section.scheme.group_size is None


def test_recipe_is_frozen():
    recipe = recipe_from_mapping({"weights": {"method": "rtn"}})
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


def test_merge_leaves_both_alone():
    base, top = {"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2]}
    assert merge(base, top) == {"a": {"b": 1, "d": 2}, "c": [2]}
    assert base == {"a": {"b": 1}, "c": [1]}
    assert top == {"a": {"d": 2}, "c": [2]}


def test_recipes_load_without_torch():
    code = "import sys; from qtool.recipe.load import load_recipe; load_recipe('rtn-w4g128')"
    heavy = run_python(code + "; print({'torch', 'transformers'} & set(sys.modules))")
    assert heavy.strip() == "set()"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("my-key=3", "No 'my-key' in the recipe"),
        ("weights.scheme.num-bits=3", "No 'num-bits' in weights.scheme. Did you mean 'num_bits'?"),
        ("calibration.int=3", "No 'int' in calibration"),
    ],
)
def test_key_that_is_no_name_is_named_as_it_was_given(setting, message):
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping({"weights": {"method": "rtn"}}, [setting])
    assert str(caught.value).startswith(message)


def test_override_of_the_group_dim_leaves_nothing_to_choose():
    values = {
        "method": "gptq",
        "choose": {"group_dim": ["in_features", "out_features"]},
        "overrides": [{"match": "*down*", "scheme": {"group_dim": "out_features"}}],
    }
    weights = recipe_from_mapping({"calibration": {}, "weights": values}).weights
    down, other = resolve(weights, "mlp.down_proj"), resolve(weights, "mlp.up_proj")
    assert down is not None and other is not None
    assert (down.scheme.group_dim, down.choose.group_dim) == ("out_features", ())
    assert other.choose.group_dim == ("in_features", "out_features")


def test_override_of_the_method_leaves_no_methods_to_choose_from():
    values = {
        "method": "gptq",
        "choose": {"group_dim": ["in_features", "out_features"], "method": ["gptq", "dint"]},
        "overrides": [{"match": "*down*", "method": "bcq"}],
    }
    weights = recipe_from_mapping({"calibration": {}, "weights": values}).weights
    down, other = resolve(weights, "mlp.down_proj"), resolve(weights, "mlp.up_proj")
    assert down is not None and other is not None
    assert (down.method, down.choose.method) == ("bcq", ())
    assert down.choose.group_dim == other.choose.group_dim
    assert other.choose.method == ("gptq", "dint")


def test_another_method_has_nothing_to_choose_from():
    values = {"method": "gptq", "choose": {"method": ["gptq", "dint"]}}
    weights = recipe_from_mapping({"weights": values}, ["weights.method=rtn"]).weights
    assert weights.choose.method == ()
    both = ["weights.choose.method=[rtn, dint]", "weights.method=rtn"]
    assert recipe_from_mapping({"weights": values}, both).weights.choose.method == ("rtn", "dint")


def test_methods_that_are_not_to_be_chosen_from_are_not_dumped():
    plain = recipe_from_mapping({"weights": {"method": "gptq"}})
    assert plain.model_dump(mode="json")["weights"]["choose"] == {"group_dim": []}
    values = {"method": "gptq", "choose": {"method": ["gptq", "dint"]}}
    several = recipe_from_mapping({"weights": values}).model_dump(mode="json")
    assert several["weights"]["choose"]["method"] == ["gptq", "dint"]
    assert recipe_from_mapping(several).weights.choose.method == ("gptq", "dint")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("calibration.sequence_length=x", "'match' or 'fixed' or a valid integer"),
        ("calibration.sequence_length=1", "greater than or equal to 2"),
        ("calibration.input_error=7", "'auto' or less than or equal to 1"),
    ],
)
def test_key_of_several_types_names_all_of_them(setting, message):
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping({"weights": {"method": "rtn"}}, [setting])
    text = str(caught.value)
    assert text.startswith(setting.split("=")[0] + " is ")
    assert message in text


def test_error_of_a_recipe_has_its_key():
    with pytest.raises(RecipeError) as caught:
        load_recipe("rtn-w4g128", ["weights.scheme.num_bits=9"])
    assert caught.value.key == "weights.scheme.num_bits"


def test_error_of_a_recipe_has_its_file(tmp_path):
    file = tmp_path / "mine.yaml"
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file))
    assert caught.value.file == file
    file.write_bytes(b"\xff")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file))
    assert caught.value.file == file


@pytest.mark.parametrize("prefix", ["block", "original"])
@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("tuning.blocks.steps=4", "tuning.blocks"),
        ("calibration.bias_correction=true", "calibration.bias_correction"),
    ],
)
def test_a_prefix_without_a_quantized_block_leaves_nothing_to_go_on_with(prefix, setting, key):
    settings = [f"calibration.prefix={prefix}", setting]
    with pytest.raises(RecipeError, match=rf"{key} goes on .* '{prefix}' .* or leave {key} out"):
        recipe_from_mapping({"weights": {"method": "gptq"}}, settings)
    recipe_from_mapping({"weights": {"method": "gptq"}}, ["calibration.prefix=linears", setting])


DATA = MINIMAL + "calibration: {dataset: wikitext2-valid}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "activations: {percentile: 99}\n", "range percentile"),
        (
            MINIMAL + "activations: {granularity: tensor, range: mse, percentile: 99}\n",
            "percentile",
        ),
        (MINIMAL + "calibration: {tasks: [gsm8k]}\n", "sequence_length match"),
        (MINIMAL + "calibration: {num_tokens: 4096, sequence_length: 64}\n", "num_tokens, 4096"),
        (MINIMAL + "embedding: {rows: {average_bits: 3, clusters: 2}}\n", "rule clusters"),
        (MINIMAL + "head: {rows: {average_bits: 3, ratio: 4}}\n", "ratio, 4"),
        (MINIMAL + "search: {trials: 9}\n", "method tpe"),
        (MINIMAL + "search: {method: tpe, keep: 2}\n", "method grid"),
        (
            DATA + "tuning: {end_to_end: {self_written: 0.3}}\n",
            "^tuning.end_to_end.self_written adds",
        ),
    ],
)
def test_what_nothing_reads_is_refused(write, text, message):
    refused(write(text), rf"{message}.*leave \w+ (out|at .+) \(r\.yaml")


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL + "activations: {granularity: tensor, range: percentile, percentile: 99}\n",
        MINIMAL + "calibration: {tasks: [gsm8k], num_tokens: 4096, sequence_length: match}\n",
        MINIMAL + "embedding: {rows: {rule: clusters, clusters: 2, ratio: 4}}\n",
        MINIMAL + "search: {keep: 2}\n",
        DATA + "tuning: {end_to_end: {self_written: 0}}\n",
        MINIMAL + "tuning: {end_to_end: {self_written: 0.3}}\n",
    ],
)
def test_what_is_read_is_taken_and_so_is_its_record(write, text):
    recipe = load_recipe(write(text))
    assert recipe_from_mapping(recipe.model_dump()) == recipe, "as a checkpoint records it"
