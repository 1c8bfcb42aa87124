"""What the `cpu` backend runs between the products of a prompt, against plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.core.native import building
from qtool.core.native.library import NATIVE_DTYPES, Library, found_library
from qtool.runtime.decode import prompts
from qtool.runtime.decode.torch_ops import rms_norm, silu_times
from tests.helpers import normal

needs_compiler = pytest.mark.skipif(building.compiler() is None, reason="there is no C compiler")
SIZES = st.integers(1, 700)


def assert_rounded_alike(found, expected):
    """Narrow numbers differ where a sum in another order is rounded elsewhere: by one step."""
    steps = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
    torch.testing.assert_close(found, expected, rtol=steps[found.dtype], atol=1e-6)
    if found.dtype != torch.float32:
        assert (found != expected).double().mean() <= 0.01


@needs_compiler
@settings(max_examples=25, deadline=None)
@given(dtype=st.sampled_from(NATIVE_DTYPES), rows=st.integers(1, 9), size=SIZES, threads=SIZES)
def test_norms_and_gates_round_where_torch_does(dtype, rows, size, threads):
    library = found_library()
    assert isinstance(library, Library)
    calls, number, threads = library.calls, NATIVE_DTYPES.index(dtype), 1 + threads % 3
    x, other = (normal(rows, size, seed=seed).mul(4).to(dtype) for seed in range(2))
    y = torch.empty_like(x)
    pointers = (x.data_ptr(), other.data_ptr())
    calls.qt_norm_rows(*pointers, 1e-5, rows, size, number, y.data_ptr(), threads)
    assert_rounded_alike(y, rms_norm(x, other[0], 1e-5))
    calls.qt_gate_rows(*pointers, rows, size, number, y.data_ptr(), threads)
    assert_rounded_alike(y, silu_times(torch.cat([x, other], 1)))


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 200), before=st.integers(0, 90))
def test_tokens_attend_to_all_before_them_and_none_behind(count, before):
    query, keys, values = (
        normal(*shape, seed=seed).double()
        for seed, shape in enumerate([(count, 4, 8), *[(2, before + count, 8)] * 2])
    )
    wide = [part.repeat_interleave(2, 0) for part in (keys, values)]
    scores = torch.einsum("qhd,hkd->hqk", query, wide[0]) * 0.3
    later = torch.arange(before + count) > torch.arange(before, before + count)[:, None]
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    expected = torch.einsum("hqk,hkd->qhd", weights, wide[1])
    found = prompts._alone(query, keys, values, 0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
