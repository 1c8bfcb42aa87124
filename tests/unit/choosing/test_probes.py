"""Which layers are solved with data for their prices, and what that does to those of all."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.choosing.candidates import OpenLayer, open_layers
from qtool.choosing.probes import factors, input_hessians, probes
from qtool.modeling.load import load_source
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.steps.plan import make_plan
from tests.helpers import recipe

BLOCKS = "model.layers"


def opened(model, method: str, choices=(2, 3)) -> tuple[OpenLayer, ...]:
    chosen = recipe(
        method, calibration={}, choosing={"average_bits": 8.0, "choices": list(choices)}
    )
    source = open_source(Location(model))
    return open_layers(source, chosen, make_plan(source, chosen))


def stretched(layers: tuple[OpenLayer, ...], count: int) -> tuple[OpenLayer, ...]:
    """Return the layers of the first block, as those of many."""
    first = [layer for layer in layers if layer.name.startswith(f"{BLOCKS}.0.")]
    return tuple(
        OpenLayer(
            layer.name.replace(".0.", f".{place}."), layer.group, layer.plans, layer.num_bytes
        )
        for place in range(count)
        for layer in first
    )


@pytest.mark.parametrize(("count", "expected"), [(1, {0}), (9, {4}), (30, {5, 15, 25})])
def test_few_blocks_are_probed_evenly(llama, count, expected):
    layers = stretched(opened(llama, "bcq"), count)
    found = probes(layers, BLOCKS)
    assert {int(layer.name.split(".")[2]) for layer in found} == expected
    assert len(found) == 7 * len(expected)


def test_methods_that_take_no_data_have_no_probes(llama):
    assert probes(opened(llama, "rtn"), BLOCKS) == ()


@given(
    st.lists(st.floats(0.2, 5), min_size=2, max_size=2),
    st.lists(st.floats(0.2, 5), min_size=7, max_size=7),
)
def test_factors_of_choices_and_kinds_are_taken_apart_exactly(llama, of_choice, of_kind):
    layers = stretched(opened(llama, "bcq"), 12)
    probed = probes(layers, BLOCKS)
    kinds = [layer.name.split(".", 3)[3] for layer in probed[:7]]
    truth = dict(zip(kinds, of_kind, strict=True))
    free = {layer.name: (0.3, 0.1) for layer in probed}
    calibrated = {
        name: [
            price * one * truth[name.split(".", 3)[3]]
            for price, one in zip(prices, of_choice, strict=True)
        ]
        for name, prices in free.items()
    }
    for name, found in factors(layers, BLOCKS, free, calibrated).items():
        expected = [one * truth[name.split(".", 3)[3]] for one in of_choice]
        assert found == pytest.approx(expected)


def test_without_probes_and_for_what_is_skipped_prices_stay(llama):
    layers = opened(llama, "bcq", [3, "skip"])
    assert set(factors(layers, BLOCKS, {}, {}).values()) == {(1.0, 1.0)}
    name = probes(layers, BLOCKS)[0].name
    found = factors(layers, BLOCKS, {name: (0.2, 0.0)}, {name: (0.1, 0.0)})
    assert found[name] == pytest.approx((0.5, 1.0))
    assert all(math.isfinite(value) for values in found.values() for value in values)


def test_hessians_are_means_over_tokens(llama):
    layers = opened(llama, "bcq")[:7]
    model = load_source(open_source(Location(llama)), "cpu")
    seen = []
    linear = model.get_submodule(layers[-1].name)
    hook = linear.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    tokens = torch.arange(24).view(2, 12)
    found = input_hessians(model, layers, [tokens, tokens[:1]])
    hook.remove()
    inputs = torch.cat([part.flatten(0, -2) for part in seen])
    torch.testing.assert_close(found[layers[-1].name], inputs.T @ inputs / len(inputs))
    assert set(found) == {layer.name for layer in layers}
    assert found[layers[0].name] is found[layers[1].name]  # of one group
