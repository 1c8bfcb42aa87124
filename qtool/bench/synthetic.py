"""Random weights made on the device: the speed of a kernel doesn't depend on what they hold."""

from math import sqrt

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.bench.shapes import HEAD_BITS, Decoder
from qtool.formats import binary_coding
from qtool.runtime import linear_kernels
from qtool.runtime.decoding.weights import (
    DecoderLayer,
    DecoderShape,
    DecoderWeights,
    Projection,
)
from qtool.scheme import Shape2D, WeightScheme

SEED = 0


def generator_on(device: torch.device) -> torch.Generator:
    """Return the seeded source of all random numbers of a run."""
    return torch.Generator(device).manual_seed(SEED)


def random_dense(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return a weight whose products with unit normal inputs are unit normal."""
    drawn = torch.randn(shape, dtype=dtype, device=generator.device, generator=generator)
    return drawn.mul_(1 / sqrt(shape[-1]))


def random_tensor(
    shape: Shape2D, scheme: WeightScheme, generator: torch.Generator
) -> QuantizedTensor:
    """Return a binary-coded weight of random planes, of the size of `random_dense`."""
    device, layout = generator.device, binary_coding.CODEC.layout(scheme, shape)
    step = 1 / sqrt(shape.in_features)
    planes, scales = layout["bit_planes"].shape, layout["plane_scales"].shape
    halves = 0.5 ** torch.arange(scheme.num_bits, device=device).view(-1, 1, 1)
    drawn = torch.rand(scales, device=device, generator=generator)
    parts = {
        "bit_planes": torch.randint(
            -(2**31), 2**31, planes, dtype=torch.int32, device=device, generator=generator
        ),
        "plane_scales": (step * halves * (0.75 + 0.25 * drawn)).half(),
    }
    if not scheme.symmetric:
        drawn = torch.randn(layout["plane_offsets"].shape, device=device, generator=generator)
        parts["plane_offsets"] = (0.1 * step * drawn).half()
    return QuantizedTensor(binary_coding.BINARY_CODING, scheme, shape, parts)


def random_decoder(
    decoder: Decoder,
    scheme: WeightScheme | None,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float16,
) -> DecoderWeights:
    """Return a whole random model; the embedding is dense.

    Args:
        decoder: Its numbers.
        scheme: Of the projections; None: they are dense, and so is the head.
        generator: On the device of the model.
        dtype: Of activations, and of what is dense.
    """

    def projection(shape: Shape2D, scheme: WeightScheme | None) -> Projection:
        if scheme is None:
            return random_dense(shape, dtype, generator)
        tensor = random_tensor(shape, scheme, generator)
        return linear_kernels.prepare(tensor, dtype)

    def norm() -> Tensor:
        return torch.rand(hidden, dtype=dtype, device=generator.device, generator=generator) + 0.5

    hidden, shapes = decoder.hidden_size, decoder.linears()
    table = Shape2D(decoder.vocab_size, hidden)
    head_scheme = None
    if scheme is not None:
        head_scheme = WeightScheme(num_bits=HEAD_BITS, group_size=scheme.group_size)
    head = projection(table, head_scheme)  # first: packing it takes most room
    embedding = random_dense(table, dtype, generator)
    layers = tuple(
        DecoderLayer(
            input_norm=norm(),
            qkv=projection(shapes["qkv"], scheme),
            qkv_bias=None,
            query_norm=None,
            key_norm=None,
            output=projection(shapes["o"], scheme),
            mlp_norm=norm(),
            gate_up=projection(shapes["gate_up"], scheme),
            down=projection(shapes["down"], scheme),
        )
        for _ in range(decoder.num_layers)
    )
    return DecoderWeights(
        _shape(decoder, dtype),
        embedding,
        layers,
        norm(),
        head,
        _inverse_frequencies(decoder, generator.device),
    )


def _shape(decoder: Decoder, dtype: torch.dtype) -> DecoderShape:
    return DecoderShape(
        hidden_size=decoder.hidden_size,
        num_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_key_value_heads,
        head_dim=decoder.head_dim,
        intermediate_size=decoder.intermediate_size,
        vocab_size=decoder.vocab_size,
        norm_eps=decoder.norm_eps,
        attention_scale=decoder.head_dim**-0.5,
        dtype=dtype,
    )


def _inverse_frequencies(decoder: Decoder, device: torch.device) -> Tensor:
    powers = torch.arange(0, decoder.head_dim, 2, dtype=torch.float32, device=device)
    return decoder.rope_theta ** (-powers / decoder.head_dim)
