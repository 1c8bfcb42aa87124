"""Load a model object with its tokenizer, quantized or not, through transformers."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qtool.base import CausalModel, Progress, Tokenizer
from qtool.checkpoint.manifest import QUANT_METHOD
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.shards import open_shards
from qtool.core.experts import separate_experts
from qtool.errors import CheckpointError, ModelError
from qtool.modeling.adapters import load_adapter
from qtool.modeling.companions import check_marks
from qtool.modeling.config import auto_class, parse_config, read_config, transformers_failures
from qtool.modeling.device import default_device, default_dtype
from qtool.modeling.leftovers import without_leftovers
from qtool.modeling.locate import Location
from qtool.modeling.skeleton import empty_model, match_names, missing_message
from qtool.modeling.source import ModelSource
from qtool.wording import list_names, shown


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run."""

    name: str
    """What to call it in results."""
    directory: Path
    model: CausalModel
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return the tokens that what it writes ends with: those of its generation config."""
        told = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        if told is None:
            told = self.tokenizer.eos_token_id
        every = told if isinstance(told, list | tuple) else [told]
        return tuple(int(token) for token in every if token is not None)

    @property
    def end(self) -> int | None:
        """Return the token that ends a text that is learned: one that ends what it writes."""
        own, stops = self.tokenizer.eos_token_id, self.stop_ids
        return own if own in stops else next(iter(stops), None)


def load_model(
    location: Location,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | Literal["auto"] | None = None,
) -> LoadedModel:
    """Load a model for evaluation; weights of another dtype are cast.

    What another tool has quantized is loaded as transformers does it, which needs that tool.

    Args:
        location: Of the model, quantized or not; its adapter, if it has one, is set.
        device: None: the first CUDA card, else the CPU.
        dtype: Of activations and unquantized weights; None: by device; `auto`: as they are stored,
            so that on the CPU they stay where the file is mapped.

    Raises:
        ModelError: transformers can't load it.
        CheckpointError: files are missing or damaged, or lack what the model needs.
    """
    config = read_config(location.directory)
    location.emit(Progress(f"loading {location.name}"))
    tokenizer = load_tokenizer(location.directory)  # quick, and may lack a library
    device = torch.device(device) if device is not None else default_device()
    dtype = dtype or default_dtype(device)
    # These say what is wrong better than transformers does.
    if foreign_method(config) is not None:
        _check_foreign(config["quantization_config"], location.directory)
        loaded = _from_pretrained(location.directory, config, dtype, str(device))
    else:
        if "quantization_config" in config:
            CheckpointReader(location.directory)
        else:
            check_weights(location.directory)
        loaded = _from_pretrained(location.directory, config, dtype).to(device)
    on_device = loaded.eval()
    if location.adapter is not None:
        load_adapter(on_device, location.adapter)
    dtype = on_device.dtype if dtype == "auto" else dtype
    return LoadedModel(location.name, location.directory, on_device, tokenizer, device, dtype)


def foreign_method(config: Mapping[str, Any]) -> str | None:
    """Return how another tool has quantized a model, by `read_config`; None: none has."""
    section = config.get("quantization_config")
    if section is None or section.get("quant_method") == QUANT_METHOD:
        return None
    return str(section.get("quant_method") or "unknown")


def _check_foreign(section: Mapping[str, Any], directory: Path) -> None:
    from transformers.quantizers.auto import AutoHfQuantizer  # slow import

    with transformers_failures(f"transformers can't load {directory}"):
        known = AutoHfQuantizer.supports_quant_method(section)
    if not known:  # it would be loaded as if nothing were quantized
        raise ModelError(
            f"{directory} was quantized as {shown(section.get('quant_method'))}, which "
            "transformers doesn't know. A newer transformers may, or import the package that "
            "registers it."
        )


def load_original(directory: Path, device: str) -> CausalModel:
    """Load an unquantized model as it is stored, experts apart, for tuning; in float32 on a CPU.

    Raises:
        ModelError: transformers can't load it.
        CheckpointError: files are missing or damaged, or lack what the model needs.
    """
    config = read_config(directory)
    dtype = "auto" if torch.device(device).type == "cuda" else torch.float32
    model = _from_pretrained(directory, config, dtype).to(device).eval()
    separate_experts(model)
    return model


def load_source(source: ModelSource, device: str) -> CausalModel:
    """Load an unquantized model with what is folded into it, as `load_original` otherwise.

    Raises:
        ModelError: transformers can't load it.
        CheckpointError: files are missing or damaged, or lack what the model needs.
    """
    model = load_original(source.directory, device)
    with torch.no_grad():
        for name in source.changed():
            model.get_parameter(name).copy_(source.read_exact(name))
    return model


def check_weights(directory: Path) -> None:
    """Refuse an unquantized model whose files aren't those of its configuration, as quantize does.

    Raises:
        ModelError: transformers can't build it.
        CheckpointError: files are missing or damaged, or a tensor is missing or stored twice.
    """
    shards = open_shards(directory)
    model = empty_model(parse_config(read_config(directory), directory), directory)
    match_names(model, shards, directory)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer of a model.

    Raises:
        ModelError: it can't be loaded, or makes no tokens, not even of nothing; or as
            `check_marks`.
    """
    import transformers

    with transformers_failures(f"{directory} has no usable tokenizer"):
        check_marks(directory)
        loaded = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        loaded("", verbose=False)  # values of its files that nobody looks at before
        template = loaded.chat_template
        if isinstance(template, str):
            loaded.chat_template = template.removeprefix("\ufeff")
        elif isinstance(template, dict):  # several of them, by their names
            loaded.chat_template = {n: one.removeprefix("\ufeff") for n, one in template.items()}
        return loaded


def _from_pretrained(
    directory: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype | str,
    device: str | None = None,
) -> CausalModel:
    """Load the weights; `device`: straight to where other tools' kernels run."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    parsed = parse_config(config, directory)
    failures = transformers_failures(f"transformers can't load {directory}")
    with failures, without_leftovers(directory) as clean:
        model, loading = auto_class(parsed).from_pretrained(
            clean,
            config=parsed,
            dtype=dtype,
            device_map=device,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        )
    model.name_or_path = model.config._name_or_path = str(directory)
    # transformers fills both kinds with noise, and warns at most.
    if loading["missing_keys"]:
        missing, unknown = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
        raise CheckpointError(missing_message(missing, unknown, directory))
    odd = sorted(key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"])
    if odd:
        raise CheckpointError(
            f"{directory}: the shapes of {list_names(odd)} aren't those that config.json makes. "
            "config.json and weights don't belong together."
        )
    return model
