"""Models of very narrow layers: one weight in a row, groups wider than a row, norms that weigh."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from qtool import pipeline
from qtool.modeling.locate import Location
from tests import every_family, families
from tests.helpers import QUICK_BCQ, recipe
from tests.stored import stored_weights

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "one column": {"hidden_size": 6, "intermediate_size": 1, "num_attention_heads": 3},
    "norms weigh": {"hidden_size": 1, "intermediate_size": 1, "num_attention_heads": 1},
    "odd": {"hidden_size": 33, "intermediate_size": 17, "num_attention_heads": 1},
}


@pytest.mark.parametrize("method", ["rtn", "bcq"])
@pytest.mark.parametrize("shape", SHAPES)
def test_narrow_layers_are_quantized_as_wide_ones_are(shape, method, tmp_path):
    sizes = {**SHAPES[shape], "num_key_value_heads": 1, "head_dim": 2}
    families.build("llama", **sizes).save_pretrained(tmp_path / "source")
    families.save_tokenizer(tmp_path / "source")
    made, samples = recipe(method, num_bits=3, group_size=128), None
    if method == "bcq":
        options = {"options": QUICK_BCQ}
        made = made.model_copy(update={"weights": made.weights.model_copy(update=options)})
        samples = every_family.samples()
    pipeline.quantize(Location(tmp_path / "source"), tmp_path / "out", made, samples=samples)
    original = every_family.load(tmp_path / "source")
    every_family.put(original, stored_weights(tmp_path / "out"))
    said = every_family.logits(every_family.load(tmp_path / "out"))
    torch.testing.assert_close(said, every_family.logits(original), rtol=1e-4, atol=1e-5)
