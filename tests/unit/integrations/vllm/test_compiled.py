"""A layer's products in compiled graphs, and in CUDA graphs on a card."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import qtool.formats
from qtool import plugins
from qtool.checkpoint.manifest import codec
from qtool.integrations.vllm.incoming import RankWeight, moved_to
from qtool.integrations.vllm.products import multiply_all, prepare_products
from qtool.scheme import ActivationScheme, Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import normal

FORMATS = plugins.names(qtool.formats)
INPUTS = [None, ActivationScheme(), ActivationScheme(granularity="tensor", scale=0.05)]
SCHEME = WeightScheme(num_bits=4, group_size=64)


def layer(name, device, dtype, activation=None):
    """Return products of a layer of two weights that agree and one that doesn't, and these."""
    tensors = [
        random_tensor(name, replace(SCHEME, num_bits=bits), Shape2D(rows, 256), rows)
        for rows, bits in ((64, 4), (32, 4), (32, 3))
    ]
    dense = torch.cat([codec(name).dequantize(tensor, torch.float32) for tensor in tensors])
    pieces = [RankWeight(moved_to(torch.device(device), each), activation) for each in tensors]
    return prepare_products(pieces, dtype), dense


@pytest.mark.parametrize("activation", INPUTS, ids=["floats", "per token", "per tensor"])
def test_one_graph_serves_all_numbers_of_tokens(activation):
    torch._dynamo.reset()
    products, dense = layer("affine", "cpu", torch.float32, activation)
    counter = CompileCounter()
    run = torch.compile(
        lambda x: multiply_all(products, x), backend=counter, fullgraph=True, dynamic=True
    )
    for tokens in (2, 3, 17, 130):
        x = normal(tokens, 256)
        y = multiply_all(products, x)
        assert y.shape == (tokens, len(dense))
        torch.testing.assert_close(run(x), y)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # and its advice
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", INPUTS, ids=["floats", "per token", "per tensor"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_cuda_graph_of_a_compiled_layer_is_the_layer(name, activation, dtype):
    torch._dynamo.reset()
    products, dense = layer(name, "cuda", dtype, activation)
    run = torch.compile(lambda x: multiply_all(products, x), fullgraph=True, dynamic=True)
    for tokens in (2, 16, 130):
        x = normal(tokens, 256).to("cuda", dtype)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled before they are captured
                run(x)
        stream.synchronize()
        graph, more = torch.cuda.CUDAGraph(), normal(tokens, 256, seed=1).to("cuda", dtype)
        with torch.cuda.graph(graph):
            y = run(x)
        x.copy_(more)
        graph.replay()
        torch.cuda.synchronize()
        expected = more.float() @ dense.cuda().T
        error = (y.float() - expected).norm() / expected.norm()
        assert error < (0.02 if activation is None else 0.1)
