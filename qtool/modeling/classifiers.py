"""Load a dense model that classifies texts; or an encoder that is to learn it."""

from pathlib import Path

import torch

from qtool.base import CausalModel
from qtool.errors import ModelError
from qtool.modeling.config import parse_config, read_config, transformers_failures
from qtool.modeling.encoders import encoder_adapter, knows_encoder
from qtool.modeling.leftovers import without_leftovers


def is_encoder(directory: Path) -> bool:
    """Return whether a model is an encoder that can classify texts, or learn to."""
    return knows_encoder(read_config(directory))


def load_encoder(directory: Path, device: torch.device, num_classes: int) -> CausalModel:
    """Load an encoder with a head for so many classes, in float32; a missing head is random.

    Raises:
        ModelError: transformers can't load it, or it has a head for fewer classes.
    """
    import transformers

    config = read_config(directory)
    parsed = parse_config(config, directory)
    has_head = encoder_adapter(config) is not None
    if has_head and parsed.num_labels < num_classes:
        raise ModelError(
            f"{directory} tells {parsed.num_labels} classes apart, and the data has {num_classes}. "
            "Give labels from 0 on, or start from an encoder without a head."
        )
    if not has_head:
        parsed.num_labels = num_classes
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    failures = transformers_failures(f"transformers can't load {directory}")
    with failures, without_leftovers(directory) as clean:
        model: CausalModel = transformers.AutoModelForSequenceClassification.from_pretrained(
            clean, config=parsed, dtype=torch.float32, trust_remote_code=False
        )
    return model.to(device).eval()
