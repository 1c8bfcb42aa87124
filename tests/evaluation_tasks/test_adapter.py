"""Tasks on a model with an adapter: its own scores, which are kept apart from those of the base."""

import torch

from qtool.checkpoint.adapter import PLANE_SCALES
from qtool.checkpoint.adapter_files import Adapter, write_adapter
from qtool.formats._in_planes import in_planes
from qtool.modeling.adapters import digest_of_base, quantized_modules
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location


def test_scores_with_an_adapter_are_its_own(evaluate, long_checkpoint, tmp_path):
    model = load_model(Location(long_checkpoint), device="cpu").model
    layers = {}
    for name, module in quantized_modules(model).items():
        scales = in_planes(module.stored()).parts[PLANE_SCALES]
        layers[name] = {PLANE_SCALES: torch.rand(1, *scales.shape[1:]).half() / 4}
    made = Adapter(kind="alpha", base=digest_of_base(model), layers=layers)
    write_adapter(tmp_path / "mine", made)
    plain = evaluate("arc_easy", model=long_checkpoint, limit=8)
    adapted = evaluate("arc_easy", model=long_checkpoint, limit=8, adapter=tmp_path / "mine")
    assert adapted.model.name.endswith(" with mine")
    assert not adapted.model.tasks[0].cached
    again = evaluate("arc_easy", model=long_checkpoint, limit=8, adapter=tmp_path / "mine")
    assert again.model.tasks[0].cached
    assert again.rows == adapted.rows
    assert evaluate("arc_easy", model=long_checkpoint, limit=8).rows == plain.rows
