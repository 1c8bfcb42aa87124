"""What a script or a log gets from the CLI."""

import json
import math
from dataclasses import asdict, dataclass

import pytest

from qtool.cli import console


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
