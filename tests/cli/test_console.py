"""What a script or a log gets from the CLI."""

import json
import math
from dataclasses import asdict, dataclass

import pytest

from qtool.cli import console
from qtool.cli.options import check_targets
from qtool.errors import OutputError


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
