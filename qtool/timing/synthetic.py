"""Random weights made on the device: the speed of a kernel doesn't depend on what they hold."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.errors import BackendError
from qtool.formats import binary_coding
from qtool.runtime.backends.cuda import linear_kernels
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.mixed import MixedWeight, joined_classes
from qtool.runtime.backends.cuda.tiles import TILE_ROWS
from qtool.runtime.decode.weights import (
    DecoderLayer,
    DecoderShape,
    DecoderWeights,
    Projection,
    RankPart,
)
from qtool.runtime.tensor_parallel import TensorParallel, even_parts
from qtool.scheme import Shape2D, WeightScheme
from qtool.timing.shapes import HEAD_BITS, DecoderSizes

DTYPE = torch.float16
"""Of activations, and of what is dense."""
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


def random_weight(
    shape: Shape2D,
    scheme: WeightScheme,
    generator: torch.Generator,
    *,
    keep_stored: bool | None = None,
) -> KernelWeight | MixedWeight:
    """Return a random weight for the kernels; where it has classes of rows, they are scattered."""
    classes = []
    for num_bits, count in scheme.classes(shape):
        own, cut = scheme.uniform(num_bits), shape._replace(out_features=count)
        drawn = random_tensor(cut, own, generator)
        classes.append(linear_kernels.prepare(drawn, DTYPE, keep_stored=keep_stored))
    if not scheme.rows:
        return classes[0]
    counts = torch.tensor([count for _, count in scheme.rows], device=generator.device)
    shuffled = torch.randperm(shape.out_features, device=generator.device, generator=generator)
    kinds = torch.arange(len(counts), device=generator.device).repeat_interleave(counts)[shuffled]
    return joined_classes(classes, kinds.argsort(stable=True).argsort())


def random_decoder(
    decoder: DecoderSizes,
    scheme: WeightScheme | None,
    device: torch.device,
    group: TensorParallel | None = None,
) -> DecoderWeights:
    """Return a whole random model; the embedding is dense, without a scheme all else is too.

    Of a group, what its rank has of a model, on the rank's device: parts of all ranks are as alike
    as their sizes.

    Raises:
        BackendError: the model has too few heads for the ranks.
    """
    generator = generator_on(device if group is None else group.device)
    table = Shape2D(decoder.vocab_size, decoder.hidden_size)
    head_scheme = scheme and WeightScheme(num_bits=HEAD_BITS, group_size=scheme.group_size)
    head = _head(table, head_scheme, generator, group)  # first: packing it takes most room
    embedding = random_dense(table, DTYPE, generator)
    as_part = None
    if group is not None:
        own = [_of_rank(decoder, scheme, rank, group) for rank in range(group.world_size)]
        decoder, is_even = own[group.rank], len(set(own)) == 1
        as_part = partial(RankPart, group=group, is_even=is_even)
    layers = tuple(_layer(decoder, scheme, generator, as_part) for _ in range(decoder.num_layers))
    norm = _norm(decoder.hidden_size, generator)
    powers = torch.arange(0, decoder.head_dim, 2, dtype=torch.float32, device=generator.device)
    frequencies = decoder.rope_theta ** (-powers / decoder.head_dim)
    shape = _shape(decoder)
    return DecoderWeights(shape, embedding, layers, norm, head, frequencies, group=group)


def _of_rank(
    decoder: DecoderSizes, scheme: WeightScheme | None, rank: int, group: TensorParallel
) -> DecoderSizes:
    """Return the sizes of what a rank of a group has."""
    unit = (scheme and scheme.group_size) or 1
    heads = even_parts(decoder.num_key_value_heads, 1, group.world_size)
    inner = even_parts(decoder.intermediate_size, unit, group.world_size)
    if heads is None or inner is None:
        raise BackendError(
            f"{decoder.num_key_value_heads} key-value heads are too few for {group.world_size} "
            "cards. Time fewer."
        )
    own, queries = len(heads[rank]), decoder.num_heads // decoder.num_key_value_heads
    return replace(
        decoder,
        num_key_value_heads=own,
        num_heads=own * queries,
        intermediate_size=len(inner[rank]),
    )


def _head(
    table: Shape2D,
    scheme: WeightScheme | None,
    generator: torch.Generator,
    group: TensorParallel | None,
) -> Projection:
    parts = even_parts(table.out_features, TILE_ROWS, group.world_size) if group else None
    if group is None or parts is None:
        return _projection(table, scheme, generator)
    rows = tuple(map(len, parts))
    own = table._replace(out_features=rows[group.rank])
    return RankPart(_projection(own, scheme, generator), group, rows)


def _layer(
    decoder: DecoderSizes,
    scheme: WeightScheme | None,
    generator: torch.Generator,
    as_part: Callable[[Projection], RankPart] | None,
) -> DecoderLayer:
    shapes = decoder.linears().items()
    linears = {name: _projection(shape, scheme, generator) for name, shape in shapes}
    if as_part is not None:
        linears |= {name: as_part(linears[name]) for name in ("o", "down")}
    return DecoderLayer(
        input_norm=_norm(decoder.hidden_size, generator),
        qkv=linears["qkv"],
        qkv_bias=None,
        query_norm=None,
        key_norm=None,
        output=linears["o"],
        mlp_norm=_norm(decoder.hidden_size, generator),
        gate_up=linears["gate_up"],
        down=linears["down"],
    )


def _projection(
    shape: Shape2D, scheme: WeightScheme | None, generator: torch.Generator
) -> Projection:
    if scheme is None:
        return random_dense(shape, DTYPE, generator)
    return linear_kernels.prepare(random_tensor(shape, scheme, generator), DTYPE)


def _norm(width: int, generator: torch.Generator) -> Tensor:
    return torch.rand(width, dtype=DTYPE, device=generator.device, generator=generator) + 0.5


def _shape(decoder: DecoderSizes) -> DecoderShape:
    sizes = asdict(decoder)
    for name in ("num_layers", "hidden_size", "intermediate_size", "rope_theta"):
        del sizes[name]
    return DecoderShape(**sizes, attention_scale=decoder.head_dim**-0.5, dtype=DTYPE)
