"""Load a model that ranks share, or one that has the process to itself."""

from dataclasses import replace

from qtool.base import Emit
from qtool.modeling.device import default_dtype
from qtool.modeling.load import LoadedModel, load_model
from qtool.modeling.locate import Location
from qtool.pipeline.imported import as_ours
from qtool.runtime.spread import spread_model
from qtool.runtime.tensor_parallel import TensorParallel


def load_shared(model: Location, group: TensorParallel | None, emit: Emit) -> LoadedModel:
    """Return a model, of a group this rank's part of it; the host has no more of it for long.

    What is stored as it is used is mapped from the files, of which ranks see the same pages.

    Raises:
        BackendError: it can't be spread over the ranks.
        ModelError: transformers can't load it.
        CheckpointError: files are missing or damaged, or lack what the model needs.
    """
    if group is None:
        return load_model(as_ours(model, emit))
    if group.leads:
        as_ours(model, emit)
    group.gather_objects(None)  # what is converted is kept, and then found by all
    dtype = default_dtype(group.device)
    loaded = load_model(as_ours(model, emit), device="cpu", dtype="auto")
    own = spread_model(loaded.model, group, dtype=dtype)
    return replace(loaded, model=own, device=group.device, dtype=dtype)
