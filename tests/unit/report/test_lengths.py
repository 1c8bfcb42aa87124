"""The picture of the lengths: drawn where matplotlib is, else an error that names the extra."""

import sys

import pytest

from qtool.errors import MissingExtraError, OutputError
from qtool.report.lengths import draw_lengths


@pytest.mark.parametrize("requested", [(), (20, 30, 40, 900)])
def test_plot_is_a_png_and_starts_no_window(tmp_path, requested):
    pytest.importorskip("matplotlib")
    draw_lengths(tmp_path / "lengths.png", (30, 30, 64), requested)
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


def test_one_length_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw_lengths(tmp_path / "lengths.png", (2048,) * 8)
    assert (tmp_path / "lengths.png").stat().st_size > 0


def test_plot_into_nowhere_is_one_sentence(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(OutputError, match=r"Can't write .*lengths\.png"):
        draw_lengths(tmp_path / "no" / "lengths.png", (3, 4))


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it fails
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(
        MissingExtraError,
        match=r"lengths\.png needs .*pip install .*'matplotlib",
    ):
        draw_lengths(tmp_path / "lengths.png", (3, 4))
