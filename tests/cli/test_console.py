"""What a script or a log gets from the CLI."""

import errno
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from qtool.cli import console
from qtool.cli.options import check_targets
from qtool.errors import OutputError
from qtool.report.lengths import new_axes, save_plot


@dataclass
class Result:
    value: float
    rows: tuple[float, ...]


def test_json_has_null_for_what_is_no_finite_number(tmp_path):
    target = tmp_path / "out.json"
    result = asdict(Result(math.nan, (1.5, math.inf)))
    console.write_json({"result": result, "nested": [{"x": -math.inf}], "words": "NaN"}, target)
    found = json.loads(target.read_text(), parse_constant=pytest.fail)
    assert found == {
        "result": {"value": None, "rows": [1.5, None]},
        "nested": [{"x": None}],
        "words": "NaN",
    }


def test_looking_whether_a_result_can_be_written_leaves_all_as_it_was(tmp_path):
    (tmp_path / "later").symlink_to("result.json")
    (tmp_path / "nowhere").symlink_to("none/result.json")
    check_targets([tmp_path / "later", tmp_path / "new.json"])
    with pytest.raises(OutputError, match=r"there is no folder .*none\. Make it first"):
        check_targets([tmp_path / "nowhere"])
    assert {path.name for path in tmp_path.iterdir()} == {"later", "nowhere"}
    console.write_json({}, tmp_path / "later")
    assert (tmp_path / "result.json").read_text() == "{}\n"
    assert (tmp_path / "later").is_symlink()


def _plot(_, target):
    pytest.importorskip("matplotlib")
    axes = new_axes(target)
    axes.plot([0, 1], label="x")
    save_plot(axes, target, legend="outside upper left")


@pytest.mark.parametrize("write", [console.write_text, _plot])
def test_an_earlier_result_stays_until_the_new_one_is_whole(tmp_path, monkeypatch, write):
    target = tmp_path / "result.svg"
    before = "<?xml earlier"
    target.write_text(before)
    seen = []

    def full(self, _target):
        seen.append((target.read_text(), self.stat().st_size))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="Can't write"):
        write("x", target)
    ((there, size),) = seen
    assert there == target.read_text() == before
    assert size
    assert [path.name for path in tmp_path.iterdir()] == ["result.svg"]


def test_a_pipe_gets_the_result_itself(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    console.write_json({"a": 1}, pipe)
    assert json.loads(os.read(reader, 100)) == {"a": 1}
    assert pipe.is_fifo()
    os.close(reader)
