"""config.json: read and checked in one place, and understood by transformers alone."""

import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qtool.base import ModelConfig
from qtool.checkpoint.old_records import check_old_record
from qtool.checkpoint.shards import read_json
from qtool.errors import CheckpointError, ModelError, QtoolError
from qtool.modeling.encoders import encoder_adapter
from qtool.storage.plain_json import json_line, leaves
from qtool.wording import quoted, reason, shown

ABOVE_ZERO = (
    *("rope_theta", "rotary_emb_base", "rope_local_base_freq", "factor"),
    *("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
)
SHARES = ("partial_rotary_factor", "rotary_pct")
"""Of a head that turns with the position: above zero, at most all of it."""
RETURNED = (
    *("return_dict", "use_return_dict", "torchscript"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
)
"""What a model returns: no part of it, and whoever runs it reads what is returned by name."""
CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel|ModelWithLMHead|GenerationDecoder)$")
MULTIMODAL = re.compile(r"ForConditionalGeneration$")
"""With a `text_config`: a text decoder and what makes tokens of images or sound."""


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json without what says nothing or names code: the original's, or ours.

    A `quantization_config` that is null or empty means an unquantized model.

    Raises:
        ModelError: there is none, or it needs what qtool doesn't do.
        CheckpointError: it, or generation_config.json, holds no JSON object, or no numbers of
            tokens where these are meant; or as `check_old_record`.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{directory} has no config.json: it isn't a model directory, or not a finished one."
        )
    config = _of_model(read_json(path))
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = _of_model(config["text_config"])
    if not config:
        raise ModelError(
            f"{path} is empty: it names no model, such as by its model_type and architectures. "
            "Download it again."
        )
    check_old_record(directory, config)
    if config.get("quantization_config") in (None, {}):
        config.pop("quantization_config", None)
    elif not isinstance(config["quantization_config"], dict):
        raise ModelError(
            f"{path}: quantization_config is {shown(config['quantization_config'])}; it must be "
            "an object. Remove it if the weights aren't quantized."
        )
    if config.get("transformers_weights") is not None:
        raise ModelError(
            f"{path} names a file of weights (transformers_weights). Rename that file to "
            "model.safetensors and remove the key."
        )
    if (directory / "generation_config.json").is_file():
        _check_ends(directory / "generation_config.json")
    if (directory / "adapter_config.json").is_file() and any(directory.glob("adapter_model.*")):
        raise ModelError(
            f"{directory} holds an adapter beside the weights (adapter_config.json). Merge it and "
            "save the merged model, or move the adapter's files away."
        )
    return config


def _check_ends(path: Path) -> None:
    """Refuse text and the like for the tokens that end what is written."""
    told = read_json(path).get("eos_token_id")
    if not all(type(one) is int for one in (told if isinstance(told, list) else [told or 0])):
        raise CheckpointError(
            f"{path}: eos_token_id is {quoted(told)}; a token's number is meant, or a list of them."
        )


def _of_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section without code, and without what a caller wants to have returned."""
    return {key: value for key, value in config.items() if key not in (*RETURNED, "auto_map")}


def check_original(config: Mapping[str, Any], directory: Path, families: tuple[str, ...]) -> None:
    """Check that a configuration is that of an unquantized causal language model.

    Args:
        config: From `read_config`.
        directory: For messages.
        families: Model types that are causal without saying so in `architectures`.

    Raises:
        ModelError: it isn't.
    """
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method") or "it doesn't say how"
        raise ModelError(
            f"{directory} is already quantized ({shown(method)}). Start from the original model."
        )
    family = config.get("model_type")
    if family is not None and not isinstance(family, str):
        raise ModelError(f"{directory}: model_type is {shown(family)} in config.json, no name.")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"{directory}: architectures is {shown(names)} in config.json; it must be a list of "
            "names, such as ['LlamaForCausalLM']."
        )
    causal = any(CAUSAL.search(name) for name in names) or (family in families and not names)
    if isinstance(config.get("text_config"), dict):
        causal = causal or any(MULTIMODAL.search(name) for name in names)
    causal = causal or encoder_adapter(config) is not None
    if not causal or config.get("is_encoder_decoder"):
        what = shown(", ".join(names) or family or "of unknown type")
        raise ModelError(
            f"{directory} is no causal language model ({what}). qtool quantizes decoder-only "
            "models, whose architecture ends in ForCausalLM or LMHeadModel, and text decoders of "
            "multimodal ones."
        )
    if family is None:
        raise ModelError(f"{directory}: config.json has no model_type, so the family is unknown.")


@contextlib.contextmanager
def transformers_failures(what: str) -> Iterator[None]:
    """Turn what transformers raises, many unrelated types, into a ModelError: `what`, and why."""
    try:
        yield
    except QtoolError:
        raise
    except Exception as error:
        raise ModelError(f"{what}: {reason(error)}.") from error


def parse_config(config: Mapping[str, Any], directory: Path) -> ModelConfig:
    """Return transformers' configuration object: defaults and other names are its business.

    Raises:
        ModelError: transformers doesn't know the family, or refuses a value; or a number is text,
            or one of the rotation by position is out of range.
    """
    import transformers  # slow import

    what = f"{directory}: transformers can't use its config.json"
    # A file, because what AutoConfig does with one is more than looking up a class.
    with transformers_failures(what), tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(json_line(dict(config)))
        parsed = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    _check_numbers(config, parsed, directory)
    _check_rope(parsed, directory)
    parsed._name_or_path = str(directory)
    return parsed


def auto_class(config: ModelConfig) -> type[Any]:
    """Return the class of transformers that builds and loads the model of a configuration.

    That is `AutoModelForCausalLM`, unless the configuration names the whole of a multimodal model,
    or a classifier.
    """
    import transformers  # slow import

    auto, whole = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    named, kind = getattr(config, "architectures", None) or (), type(config)
    if encoder_adapter({"model_type": config.model_type, "architectures": named}) is not None:
        return transformers.AutoModelForSequenceClassification

    def is_named(one: type[Any]) -> bool:
        found = one._model_mapping.get(kind, None)
        return found is not None and found.__name__ in named

    is_whole = is_named(whole) and not is_named(auto)
    return whole if is_whole or kind not in auto._model_mapping else auto


def _check_numbers(config: Mapping[str, Any], parsed: ModelConfig, directory: Path) -> None:
    """Refuse text in place of a number, as transformers 5 does.

    Version 4 notices when the model runs, or never.
    """
    if getattr(parsed, "has_no_defaults_at_init", True):  # version 5 doesn't have it
        return
    usual = type(parsed)().to_dict()
    for key, value in config.items():
        if type(usual.get(key)) in (int, float) and isinstance(value, str | dict):
            raise ModelError(
                f"{directory}: {key} is {quoted(value)} in config.json; a number is meant."
            )


def _check_rope(parsed: ModelConfig, directory: Path) -> None:
    """Refuse numbers of rotary embeddings with which no model runs; transformers takes them."""
    for where, value in leaves(parsed.to_dict()):
        key = where.rpartition(".")[2]
        if not isinstance(value, int | float) or key not in (*ABOVE_ZERO, *SHARES):
            continue
        highest = 1 if key in SHARES else sys.float_info.max
        if not 0 < value <= highest:
            allowed = "above 0, at most 1," if key in SHARES else "above 0"
            raise ModelError(
                f"{directory}: {shown(where)} is {quoted(value)} in config.json; a number "
                f"{allowed} is meant."
            )
