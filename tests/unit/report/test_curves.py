"""Curves of tuning, as they are read and drawn."""

import pytest

from qtool.errors import CheckpointError
from qtool.report.curves import draw_curves, read_curves

LINES = (
    '{"of": "model.layers.0", "step": 0, "held_out": 0.5}\n'
    '{"of": "model", "step": 0, "held_out": 0.4}\n'
    '{"of": "model", "step": 10, "held_out": 0.1}\n'
    '{"of": "model", "step": 20, "held_out": null}\n'
)


def test_curves_are_read_by_what_they_are_of_without_losses_that_are_none(tmp_path):
    path = tmp_path / "tuning.jsonl"
    path.write_text(LINES)
    curves = read_curves(path)
    assert curves == {"model.layers.0": [(0, 0.5)], "model": [(0, 0.4), (10, 0.1)]}
    draw_curves(tmp_path / "curves.png", curves)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("line", ["3", '{"of": "model", "step": 1}'])
def test_a_line_of_something_else_is_named(tmp_path, line):
    path = tmp_path / "tuning.jsonl"
    path.write_text(LINES + line + "\n")
    with pytest.raises(CheckpointError, match="5"):
        read_curves(path)
