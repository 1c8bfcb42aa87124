"""Encoders that classify texts: one file per `model_type`, as `families`, constant ADAPTER.

They aren't among the families, since they write no text: they are quantized and trained, and what
needs a decoder refuses them.
"""

import re
import sys
from collections.abc import Mapping
from typing import Any

from qtool import plugins
from qtool.base import ModelAdapter

CLASSIFIER = re.compile(r"ForSequenceClassification$")


def encoder_adapter(config: Mapping[str, Any]) -> ModelAdapter | None:
    """Return the adapter of a classifier of a known family, by config.json; None: it is none."""
    family, named = config.get("model_type"), config.get("architectures") or ()
    known = plugins.names(sys.modules[__name__])
    if family not in known or not any(CLASSIFIER.search(str(name)) for name in named):
        return None
    return plugins.load(sys.modules[__name__], str(family), "ADAPTER", ModelAdapter)


def knows_encoder(config: Mapping[str, Any]) -> bool:
    """Return whether a model of this family can be made a classifier, whatever it is now."""
    return config.get("model_type") in plugins.names(sys.modules[__name__])
