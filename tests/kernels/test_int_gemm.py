"""Products of quantized inputs: the kernels' own text, on the CPU, against the definition."""

import pytest
import torch

from qtool.base import QuantizedTensor
from qtool.core.activations import quantize_activations
from qtool.formats import affine, dint
from qtool.runtime.backends.cuda import int_linear, int_tiles
from qtool.runtime.backends.cuda.int_linear import GemmTuning
from qtool.runtime.backends.cuda.launch import Card
from qtool.scheme import ActivationScheme, Shape2D, WeightScheme
from tests.helpers import dequantized
from tests.kernels.host import Recorder

CARD = Card(3, 227 * 1024)
AFTER_CAST = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


def weight(shape, num_bits, *, encode=affine.encode_affine, **scheme) -> QuantizedTensor:
    """Return a weight of random codes, whose first rows are as large as can be."""
    generator = torch.Generator().manual_seed(num_bits)
    made, shape = WeightScheme(num_bits=num_bits, **scheme), Shape2D(*shape)
    groups, size = made.num_groups(shape), made.group_size or shape.in_features
    codes = torch.randint(2**num_bits, (shape[0], groups, size), generator=generator)
    scales = (torch.rand(shape[0], groups, generator=generator) + 0.1) / 64
    top = 2**num_bits - (2 if encode is dint.encode_dint else 0)
    zeros = torch.randint(top, (shape[0], groups), generator=generator)
    codes[0], zeros[0], codes[1], zeros[1] = 0, top - 1, top - 1, 0
    return encode(codes.to(torch.uint8), scales.half(), zeros.to(torch.uint8), made, shape)


def inputs(tokens, features, dtype=torch.float16):
    """Return normal inputs with outliers; the first token is as large as can be everywhere."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, features, generator=generator)
    x[:, ::37] *= 20
    x[0] = x[0].abs().max()
    return x.to(dtype).contiguous()


def defined(x, scheme, tensor):
    codes, steps = quantize_activations(x, scheme)
    return (codes.double() @ dequantized(tensor, torch.float64).T) * steps.double()


def codes_in_order(codes, features):
    """Return codes as the kernel has written them: (padded tokens, in_features)."""
    tiles = codes.view(-1, features // 128, 8, 128, 16)
    return tiles.permute(0, 3, 1, 2, 4).reshape(-1, features)


@pytest.mark.parametrize("dtype", AFTER_CAST)
@pytest.mark.parametrize(
    "scheme",
    [
        ActivationScheme(),
        ActivationScheme(clip_ratio=0.9),
        ActivationScheme(num_bits=4, rounding=0.1),
        ActivationScheme(granularity="tensor", scale=0.037),
        ActivationScheme(granularity="tensor", scale=0.03125),  # many ties
    ],
    ids=str,
)
@pytest.mark.parametrize(("tokens", "features"), [(1, 128), (3, 384), (130, 1152)])
def test_codes_and_steps_are_those_of_the_definition(tokens, features, scheme, dtype):
    x = inputs(tokens, features, dtype)
    x[-1] = 0
    call = int_linear.quantize_call(tokens, features, dtype, scheme)
    padded = -(-tokens // 128) * 128
    codes = torch.full((padded * features,), 77, dtype=torch.int8)
    steps = torch.full((padded,), torch.nan)
    Recorder()(call, (x, codes, steps))
    expected, step = quantize_activations(x, scheme)
    assert torch.equal(steps[:tokens], step.squeeze(1))
    assert not bool(steps[tokens:].any())
    got = codes_in_order(codes, features)
    assert torch.equal(got[:tokens], expected)
    assert not bool(got[tokens:].any())


WEIGHTS = {
    "4 bits": weight((128, 256), 4),
    "4 bits, more groups than a sum holds": weight((64, 2432), 4),
    "4 bits, symmetric, ragged": weight((200, 256), 4, symmetric=True),
    "2 bits, odd": weight((131, 128), 2),
    "4 bits, groups of 256, the last short": weight((128, 640), 4, group_size=256),
    "4 bits, rows": weight((256, 384), 4, group_size=None),
    "5 bits": weight((128, 256), 5),
    "8 bits": weight((128, 640), 8, symmetric=True),
    "8 bits, groups of 384": weight((128, 1152), 8, group_size=384, symmetric=True),
    "8 bits, rows": weight((64, 256), 8, group_size=None, symmetric=True),
    "dint": weight((128, 256), 4, encode=dint.encode_dint),
}


@pytest.mark.parametrize("tokens", [1, 129])
@pytest.mark.parametrize("tensor", WEIGHTS.values(), ids=WEIGHTS)
def test_products_agree_with_the_definition(tensor, tokens):
    packed = int_tiles.tile_integers(tensor)
    assert packed is not None
    assert packed.tiles.nbytes == int_tiles.tile_bytes(tensor)
    scheme, x = ActivationScheme(), inputs(tokens, tensor.shape.in_features)
    recorder = Recorder()
    y = int_linear.int_linear(x, packed, scheme, recorder, CARD, GemmTuning(stages=2, cluster=2))
    expected = defined(x, scheme, tensor).to(x.dtype).double()  # beyond float16 is infinite
    assert recorder.names == ["quantize_rows", "int_gemm"]
    torch.testing.assert_close(
        y.double(),
        expected,
        rtol=1e-3,
        atol=1e-3 * float(expected[1:].std()) if tokens > 1 else 1e-3,
    )
