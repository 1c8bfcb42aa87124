"""What blocks are called with: one tensor per distinct value, the right one for each batch."""

from collections import namedtuple
from typing import Any

import torch
from torch import nn

from qtool.modeling.filling import fill
from qtool.walk.calls import Call, Calls, mapped
from tests.helpers import normal

Pair = namedtuple("Pair", "cos sin")


def calls(mask: float, own: float, blocks: int = 3) -> list[Call]:
    """Return calls of blocks that share a mask and have inputs of their own."""
    shared = torch.full((2, 2), mask)
    pair = Pair(torch.ones(2), torch.zeros(2))
    return [
        Call((shared,), {"position": pair, "own": torch.full((2,), own + block), "flag": True})
        for block in range(blocks)
    ]


def test_equal_values_are_one_tensor_for_all_blocks_and_batches():
    kept = Calls()
    for _batch in range(3):
        kept.add(calls(1.0, 5.0))
    masks = {id(call.arguments[0]) for block in range(3) for call in kept.of(block)}
    cosines = {id(call.keywords["position"].cos) for block in range(3) for call in kept.of(block)}
    assert (len(masks), len(cosines)) == (1, 1)


def test_what_differs_is_kept_for_each_batch():
    kept = Calls()
    for batch in range(3):
        kept.add(calls(1.0, 10.0 * batch))
    for block in range(3):
        values = [float(call.keywords["own"][0]) for call in kept.of(block)]
        assert values == [block, 10 + block, 20 + block]


def test_masks_of_two_kinds_of_blocks_are_two_tensors():
    kept = Calls()
    for _batch in range(3):
        first, second = calls(0.0, 0.0), calls(1.0, 0.0)
        kept.add([first[0], second[1], first[2], second[0]])
    masks = [[call.arguments[0] for call in kept.of(block)] for block in range(4)]
    assert len({id(mask) for row in masks for mask in row}) == 2
    assert [float(row[2][0, 0]) for row in masks] == [0, 1, 0, 1]


def test_other_shapes_do_not_meet():
    kept = Calls()
    for length in (2, 3, 2):
        kept.add([Call((torch.zeros(length),), {})])
    assert [len(call.arguments[0]) for call in kept.of(0)] == [2, 3, 2]


def test_nested_values_keep_their_kinds():
    value = {"a": [torch.zeros(1), None], "b": Pair(torch.zeros(1), "x"), "c": 5}
    places = []

    def change(place, tensor):
        places.append(place)
        return tensor + 1

    changed = mapped(value, change, "top")
    assert places == ["top.a.0", "top.b.0"]
    assert isinstance(changed["b"], Pair) and changed["b"].sin == "x" and changed["c"] == 5
    assert float(changed["a"][0]) == 1 and changed["a"][1] is None


class Part(nn.Module):
    """A parameter, a stored buffer, one that isn't stored, and one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, device="meta"))
        self.register_buffer("scale", torch.zeros(2, dtype=torch.float16))
        self.register_buffer("made", torch.full((2,), 7.0))
        self.register_buffer("table", torch.full((2,), 9.0), persistent=False)


class FakeSource:
    """A source of a few tensors."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = {name.replace("__", "."): tensor for name, tensor in tensors.items()}

    def has(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    read_exact = read


def test_stored_buffers_are_read_and_others_stay_as_the_class_made_them():
    weight, scale = normal(2), normal(2, seed=1)
    tables = {"a__0__table": torch.zeros(2)}  # left over from another version of the class
    source: Any = FakeSource(a__0__weight=weight, a__0__scale=scale, **tables)
    module = nn.ModuleList([Part()])
    fill(module, "a", source, "cpu")
    part: Any = module[0]
    assert torch.equal(part.weight, weight)
    assert torch.equal(part.scale, scale.half()) and part.scale.dtype == torch.float16
    assert part.made.tolist() == [7, 7] and part.table.tolist() == [9, 9]
