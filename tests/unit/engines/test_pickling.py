"""Values as bytes, and as bytes beside arrays."""

import pytest
import torch

from qtool.engines._pickling import dumps, dumps_apart, loads, loads_apart


@pytest.mark.parametrize("is_apart", [False, True])
def test_what_is_read_may_be_changed_and_nothing_else_is(is_apart):
    sums = torch.arange(6.0).view(2, 3).T
    value = {"sums": sums, "empty": torch.empty(0, 3), "name": "q_proj"}
    before = sums.clone()
    if is_apart:
        content, arrays = dumps_apart(value)
        assert [array.nbytes for array in arrays] == [24]
        arrays[0].flags.writeable = False  # as those of Ray's object store
        found = loads_apart(content, arrays)
    else:
        found = loads(dumps(value))
    assert torch.equal(found["sums"], before)
    assert (found["empty"].shape, found["name"]) == ((0, 3), "q_proj")
    found["sums"].zero_()
    assert torch.equal(sums, before)
