import itertools

import pytest
import torch

from qtool.errors import UnknownNameError
from qtool.runtime.backends.cuda import linear_kernels
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.scheme import WeightScheme
from qtool.timing import shapes, synthetic
from qtool.timing.shapes import MODELS
from tests.helpers import dequantized, run_python
from tests.unit.timing.rig import TINY

CPU = torch.device("cpu")
ALL = {**MODELS, "tiny": TINY}


@pytest.mark.parametrize("name", [name for name, m in ALL.items() if m.decoder])
def test_shapes_of_linears_follow_from_the_numbers_of_the_model(name):
    model = ALL[name]
    d = model.decoder
    assert d is not None
    inner = d.num_heads * d.head_dim
    got = {linear.name: (*linear.shape, linear.count) for linear in model.linears}
    assert got == {
        "qkv": (inner + 2 * d.num_key_value_heads * d.head_dim, d.hidden_size, d.num_layers),
        "o": (d.hidden_size, inner, d.num_layers),
        "gate_up": (2 * d.intermediate_size, d.hidden_size, d.num_layers),
        "down": (d.hidden_size, d.intermediate_size, d.num_layers),
        "lm_head": (d.vocab_size, d.hidden_size, 1),
    }


def test_every_shape_suits_words_and_groups():
    for model in MODELS.values():
        for linear in model.linears:
            assert linear.shape.in_features % 256 == 0, linear
            assert linear.shape.out_features % 16 == 0, linear


def test_an_unknown_name_is_told_the_nearest():
    assert shapes.find_shapes("opt-175b-layer").decoder is None
    with pytest.raises(UnknownNameError, match="Did you mean 'llama3-8b'"):
        shapes.find_shapes("llama-3-8b")


def test_the_table_loads_without_torch():
    code = "import sys, qtool.timing.shapes; print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 3])
def test_random_weights_are_seeded_and_keep_the_size_of_activations(bits, symmetric):
    scheme = WeightScheme(num_bits=bits, group_size=32, symmetric=symmetric)
    shape = TINY.linears[2].shape
    first, second = (
        synthetic.random_tensor(shape, scheme, synthetic.generator_on(CPU)) for _ in range(2)
    )
    assert all(torch.equal(part, second.parts[name]) for name, part in first.parts.items())
    weight = dequantized(first)
    assert 0.5 < weight.norm(dim=1).mean() < 1.5
    assert bool((first.parts["plane_scales"] > 0).all())
    linear_kernels.prepare(first, torch.float16)


def test_a_random_model_is_quantized_but_for_its_embedding_or_dense_as_a_whole():
    assert TINY.decoder is not None
    scheme = WeightScheme(num_bits=2, group_size=32)
    packed = synthetic.random_decoder(TINY.decoder, scheme, CPU)
    dense = synthetic.random_decoder(TINY.decoder, None, CPU)
    assert isinstance(packed.head, KernelWeight)
    assert packed.head.scheme.num_bits == shapes.HEAD_BITS
    for one, other in zip(packed.layers, dense.layers, strict=True):
        for name in ("qkv", "output", "gate_up", "down"):
            ours, theirs = getattr(one, name), getattr(other, name)
            assert isinstance(ours, KernelWeight)
            assert ours.scheme == scheme
            assert isinstance(theirs, torch.Tensor)
            assert tuple(ours.shape) == tuple(theirs.shape)
    assert isinstance(packed.embedding, torch.Tensor)
    assert len(packed.inverse_frequencies) == TINY.decoder.head_dim // 2


def test_heads_of_unlike_rows_have_all_rows_and_the_ratio_of_the_paper():
    linears = shapes.find_shapes("llama3-8b-heads").linears
    asked = WeightScheme(num_bits=5, group_size=64)
    assert [linear.scheme(asked).num_bits for linear in linears] == [4, 3, 2, 8, 4, 4]
    for linear in linears[3:]:
        scheme = linear.scheme(asked)
        counts = [count for _, count in scheme.rows]
        assert sum(counts) == linear.shape.out_features
        assert all(b / a == pytest.approx(2, rel=1e-3) for a, b in itertools.pairwise(counts))
        assert scheme.group_size == 64
