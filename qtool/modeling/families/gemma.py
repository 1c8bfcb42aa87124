"""Gemma: the parts of llama, and norms that multiply by one more than their weight."""

from dataclasses import replace

from qtool.modeling.families import llama

ADAPTER = replace(llama.ADAPTER, norm_offset=1.0)
