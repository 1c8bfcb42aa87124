"""What is seen of a model before transformers is imported."""

import pytest

from qtool.modeling.families import families
from qtool.modeling.glance import glance
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source


@pytest.mark.parametrize("family", families())
def test_every_family_is_seen_as_it_is_opened(tiny, family):
    seen = glance(tiny(family))
    source = open_source(Location(tiny(family)))
    assert seen is not None
    assert seen.adapter == source.adapter
    assert seen.linears == tuple(source.block_linears())
