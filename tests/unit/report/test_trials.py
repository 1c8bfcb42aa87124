"""Trials of a search, as they are read and drawn."""

import pytest

from qtool.errors import CheckpointError
from qtool.report.trials import TrialLine, draw_trials, read_trials

LINES = (
    '{"of": "a", "values": {"a.clip_ratio": null}, "error": 0.1, "loss": 0.5, "taken": false}\n'
    '{"of": "a", "values": {"a.clip_ratio": 0.9}, "error": 0.2, "loss": 0.4, "taken": true}\n'
    '{"of": "a", "values": {"a.clip_ratio": 0.8}, "error": 0.3, "loss": null, "taken": false}\n'
    '{"of": "b", "values": {"b.clip_ratio": null}, "error": 0.1, "loss": 0.6, "taken": true}\n'
)


def test_trials_with_a_loss_are_read_in_order_and_drawn(tmp_path):
    path = tmp_path / "search.jsonl"
    path.write_text(LINES)
    trials = read_trials(path)
    expected = (("a", 0.5, False), ("a", 0.4, True), ("b", 0.6, True))
    assert trials == tuple(TrialLine(*each) for each in expected)
    draw_trials(tmp_path / "trials.png", trials)
    assert (tmp_path / "trials.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_that_was_not_searched_has_none(tmp_path):
    with pytest.raises(CheckpointError, match="nothing was searched"):
        read_trials(tmp_path / "search.jsonl")


@pytest.mark.parametrize("line", ["3", '{"of": "a", "loss": 1}'])
def test_a_line_of_no_search_is_named(tmp_path, line):
    path = tmp_path / "search.jsonl"
    path.write_text(LINES + line + "\n")
    with pytest.raises(CheckpointError, match="5"):
        read_trials(path)
