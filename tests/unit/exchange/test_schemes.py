"""Random schemes, formats and shapes: written to the bit, by the peer's own decoder, or refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qtool.formats
from qtool import plugins
from qtool.checkpoint.manifest import LayerEntry
from qtool.errors import SchemeError, UnknownNameError
from qtool.exchange import load_exchange
from qtool.exchange._ct_writing import ct_group, decode_ct, packed_ct
from qtool.exchange._engines import ENGINES, kernels_of, why_no_kernel
from qtool.exchange._gptq_peer import decode_gptq
from qtool.exchange._gptq_writing import packed_layer
from qtool.scheme import ActivationScheme, Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized
from tests.unit.exchange.foreign import GPTQ, directory
from tests.unit.exchange.test_vectors import loaded

schemes = st.builds(
    WeightScheme,
    num_bits=st.integers(1, 8),
    group_size=st.sampled_from((None, 16, 32, 64, 64, 128, 7)),
    group_dim=st.sampled_from(("in_features", "in_features", "in_features", "out_features")),
    symmetric=st.booleans(),
)
sizes = st.sampled_from((1, 5, 16, 32, 33, 64, 96))
formats = st.sampled_from(("affine", "affine", "ordered_affine", *plugins.names(qtool.formats)))
activations = st.sampled_from((None, None, ActivationScheme(), ActivationScheme(num_bits=4)))


def drawn(name, scheme, shape, seed):
    """Return a random weight of positive scales; None: there is no such weight."""
    try:
        tensor = random_tensor(name, scheme, shape, seed)
    except SchemeError:
        return None
    if "scales" in tensor.parts:
        positive = tensor.parts["scales"].abs() + 2.0**-10
        tensor = replace(tensor, parts={**tensor.parts, "scales": positive})
    return tensor


def entry_of(tensor, activation=None):
    return LayerEntry(
        format=tensor.format,
        scheme=tensor.scheme,
        shape=tensor.shape,
        method="x",
        activation=activation,
    )


@settings(max_examples=200)
@given(name=formats, scheme=schemes, out=sizes, in_=sizes, seed=st.integers(0, 9999))
def test_gptq_is_exact_or_refused(name, scheme, out, in_, seed, tmp_path_factory):
    tensor = drawn(name, scheme, Shape2D(out, in_), seed)
    refuses = load_exchange("gptq").refuses
    if tensor is None or refuses is None or refuses(entry_of(tensor), "block"):
        return
    exact, version = dequantized(tensor), 1 if tensor.scheme.symmetric else 2
    written = packed_layer("x", tensor, version)
    parts = {full.removeprefix("x."): part for full, part in written.items()}
    section = {
        **GPTQ,
        "bits": tensor.scheme.num_bits,
        "group_size": tensor.scheme.group_size or -1,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    path = directory(tmp_path_factory.mktemp("written"), parts, section)
    assert torch.equal(dequantized(loaded(path)), exact)
    decoded = decode_gptq(parts, tensor, version)
    assert decoded is None or torch.equal(decoded, exact)


@settings(max_examples=200)
@given(
    name=formats,
    scheme=schemes,
    out=sizes,
    in_=sizes,
    seed=st.integers(0, 9999),
    activation=activations,
)
def test_compressed_tensors_is_exact_or_refused(
    name, scheme, out, in_, seed, activation, tmp_path_factory
):
    tensor = drawn(name, scheme, Shape2D(out, in_), seed)
    refuses = load_exchange("compressed-tensors").refuses
    if tensor is None or refuses is None:
        return
    entry = entry_of(tensor, activation)
    if refuses(entry, "block"):
        return
    exact, written = dequantized(tensor), packed_ct("x", tensor, entry)
    parts = {full.removeprefix("x."): part for full, part in written.items()}
    group = ct_group(entry, ["Linear"])
    section = {
        "quant_method": "compressed-tensors",
        "format": group["format"],
        "config_groups": {"group_0": group},
    }
    path = directory(tmp_path_factory.mktemp("written"), parts, section)
    assert torch.equal(dequantized(loaded(path)), exact)
    decoded = decode_ct(parts, entry)
    assert decoded is None or torch.equal(decoded, exact)


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("place", ["embedding", "block", "head"])
def test_layers_that_are_no_linears_are_refused(target, place):
    tensor = drawn("affine", usual_scheme(), Shape2D(32, 64), 0)
    refuses = load_exchange(target).refuses
    assert tensor is not None and refuses is not None
    assert (refuses(entry_of(tensor), place) is None) == (place != "embedding")
    tied = replace(entry_of(tensor), shared_with="model.embed_tokens")
    assert "shares the parts of one" in (refuses(tied, "head") or "")


def usual_scheme():
    return WeightScheme(num_bits=4, group_size=32, symmetric=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"symmetric": False}, "takes symmetric ones of 4, 8 bits alone"),
        ({"num_bits": 3}, "it takes symmetric ones of 4, 8 bits"),
        ({"group_size": 16}, "row, 32, 64, 128 are meant"),
    ],
)
def test_engine_says_what_it_has_no_kernel_for(change, words):
    scheme = replace(usual_scheme(), **change)
    entry = LayerEntry(format="affine", scheme=scheme, shape=Shape2D(64, 64), method="x")
    found = why_no_kernel(kernels_of("vllm@0.33", "gptq"), entry)
    assert (found is None) if words is None else words in (found or "")


def test_engines_are_known_by_name_and_version():
    assert kernels_of("vllm@0.33.0", "gptq") == kernels_of("vllm", "gptq")
    for engine in ("vlm", "vllm@0.1", "vllm@0.333"):
        with pytest.raises(UnknownNameError):
            kernels_of(engine, "gptq")
    with pytest.raises(UnknownNameError, match="what vllm reads"):
        kernels_of("vllm", "awq")
    assert all(engine.version for engine in ENGINES.values())
