"""What single sections say."""

from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qtool.recipe.load import recipe_from_mapping
from qtool.report.page.bit_map import bit_map_section
from qtool.report.page.calibration import calibration_section
from qtool.report.page.cautions import cautions_section
from qtool.report.page.choices import choices_section
from qtool.report.page.evidence import Evidence
from qtool.report.page.losses import losses_section
from qtool.report.page.parts import Absent, Cell, Code, Lines, PageSection, PageTable, Picture
from qtool.report.page.reading import read_evidence
from qtool.report.page.repeating import repeating_section
from qtool.report.page.side_by_side import front, side_by_side_section
from qtool.report.page.wordings import duration, interval, place_of, ranges


@pytest.fixture(scope="module")
def evidence(whole) -> Evidence:
    return read_evidence(whole)


def grid(section: PageSection | Absent, caption: str) -> PageTable:
    assert isinstance(section, PageSection)
    return next(
        part
        for part in section.parts
        if isinstance(part, PageTable) and part.caption.startswith(caption)
    )


def test_map_has_the_bits_of_each_layer_and_equal_neighbours_share_a_row(evidence):
    table = grid(bit_map_section(evidence), "Bits of the codes")
    assert table.columns[:5] == ("block", "q_proj", "k_proj", "v_proj", "o_proj")
    shown = [[cell.text for cell in row if isinstance(cell, Cell)] for row in table.rows]
    mlp = [name in ("gate_proj", "up_proj", "down_proj") for name in table.columns[1:]]
    assert shown == [["16" if one else "3" for one in mlp], ["2" if one else "3" for one in mlp]]
    kept = {name: spec for name, spec in evidence.unquantized.items() if ".mlp." not in name}
    entry = evidence.manifest.layers["model.layers.0.self_attn.q_proj"]
    same = {f"model.layers.{n}.self_attn.q_proj": entry for n in (0, 1, 2, 5, 7, 8)}
    alike = replace(evidence, unquantized=kept, manifest=replace(evidence.manifest, layers=same))
    assert grid(bit_map_section(alike), "Bits of the codes").rows[0][0] == "0-2, 5, 7-8"


def test_losses_are_those_of_the_report(evidence):
    table = grid(losses_section(evidence), "The 10 layers")
    worst = max(evidence.layers, key=lambda layer: layer["output_error"])
    assert table.rows[0][0] == worst["name"]
    assert table.rows[0][2] == f"{worst['output_error']:.2e}"
    free = [{"name": one["name"], "nmse": one["nmse"]} for one in evidence.layers]
    section = losses_section(replace(evidence, report={"layers": free}))
    assert grid(section, "Mean loss").columns == ("kind of layer", ">layers", ">loss")


def test_choices_count_what_was_taken(evidence):
    table = grid(choices_section(evidence), "Layers by the alternative")
    assert table.columns[1:] == (">in_features", ">out_features")
    for at, dim in ((1, "in_features"), (2, "out_features")):
        taken = sum(layer["group_dim"] == dim for layer in evidence.layers)
        assert sum(int(str(row[at])) for row in table.rows) == taken


def test_recipe_of_the_page_is_that_of_the_run(evidence):
    section = repeating_section(evidence)
    assert isinstance(section, PageSection)
    command, recipe = [part for part in section.parts if isinstance(part, Code)]
    assert command.text == "qtool quantize --recipe recipe.yaml demo:tiny whole"
    loaded = recipe_from_mapping(yaml.safe_load(recipe.text))
    assert loaded.model_dump(mode="json") == evidence.manifest.recipe


def test_warnings_and_lengths_of_a_run_are_kept(evidence):
    notices = evidence.report["notices"]
    assert any("calibration tokens are fewer" in message for message in notices)
    section = cautions_section(evidence)
    assert isinstance(section, PageSection)
    lines = [item for part in section.parts if isinstance(part, Lines) for item in part.items]
    assert set(notices) <= set(lines)
    assert evidence.report["calibration"]["used lengths"]["median"] == 32
    assert evidence.report["versions"]["qtool"]


def test_lengths_that_differ_are_drawn():
    lengths = {"median": 20, "p10": 10, "p90": 30, "edges": [10, 20, 31], "shares": [0.4, 0.6]}
    about = {"dataset": "a", "samples": 5, "tokens": 100, "used lengths": lengths}
    section = calibration_section(Evidence(name="a", report={"calibration": about}))
    assert isinstance(section, PageSection)
    assert [part.title for part in section.parts if isinstance(part, Picture)]


def test_runs_measured_unlike_are_told(evidence):
    def said(*many: Evidence) -> str:
        return str([part for part in side_by_side_section(many).parts if part.kind == "words"])

    other = {**evidence.texts, "agreement": {**evidence.texts["agreement"], "dataset": "c4"}}
    assert "can't be compared" not in said(evidence, evidence)
    assert "can't be compared" in said(evidence, replace(evidence, texts=other))


NUMBERS = st.floats(0.1, 100)


@given(st.lists(st.tuples(st.just(""), NUMBERS, NUMBERS), min_size=1))
def test_front_is_what_no_other_beats(points):
    found = front(points)
    for _, x, y in points:
        assert any(a <= x and b <= y for _, a, b in found)
    for _, x, y in found:
        assert not any((a < x and b <= y) or (a <= x and b < y) for _, a, b in points)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.0410, 0.0051, "0.041 ± 0.010"),
        (91.29, 0.88, "91.3 ± 1.7"),
        (1234.5, 50.0, "1234 ± 98"),
        (0.5, None, "0.5"),
        (None, 0.1, "not a number"),
        (0.0, 0.0, "0.0 ± 0.0"),
    ],
)
def test_intervals_have_two_digits(value, error, text):
    assert interval(value, error) == text


def test_names_and_numbers_in_words():
    assert place_of("model.layers.11.mlp.experts.3.up_proj") == (11, "mlp.experts.*.up_proj")
    assert place_of("model.embed_tokens") == (None, "model.embed_tokens")
    assert place_of("transformer.h.0.attn.c_attn") == (0, "attn.c_attn")
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert [duration(s) for s in (0.9994, 0.9996, 59.94, 59.96)] == [
        *("999 ms", "1.0 s", "59.9 s", "1 min 0 s"),
    ]
    assert [duration(s) for s in (0.0123, 12.3, 125, 7325)] == [
        "12.3 ms",
        "12.3 s",
        "2 min 5 s",
        "2 h 2 min",
    ]


def test_tokens_of_experts_are_a_table():
    starved = {f"down_proj[{index}]": "all" for index in range(5)}
    found = {"m.experts": {"tokens": [9, 1200, 0, 40], "starved": starved}}
    about = {"dataset": "d", "samples": 1, "tokens": 9}
    section = calibration_section(
        Evidence(name="a", report={"calibration": about, "experts": found})
    )
    assert isinstance(section, PageSection)
    (table,) = [part for part in section.parts if isinstance(part, PageTable)]
    said = "down_proj[0]: all, down_proj[1]: all, down_proj[2]: all and 2 more"
    assert table.rows == (("m.experts", "4", "0", "9", "1,200", said),)
