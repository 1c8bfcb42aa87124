"""The comparison that proves a refactoring of kernels tells code from text."""

from tests.kernels.nvrtc import compile_for
from tests.kernels.same_code import sections

PLAIN = 'extern "C" __global__ void scaled(float *y) { y[threadIdx.x] *= 3.0f; }'
SHARED = """
__device__ float scale(float value) { float result = value * 3.0f; return result; }
extern "C" __global__ void scaled(float *y) { y[threadIdx.x] = scale(y[threadIdx.x]); }
"""


def test_code_is_the_same_however_it_is_written_and_only_then():
    plain, shared, other, smaller = (
        sections(compile_for("sm_80", text).cubin)
        for text in (
            PLAIN,
            SHARED,
            PLAIN.replace("3.0f", "5.0f"),
            PLAIN.replace("void scaled", "void __launch_bounds__(64) scaled"),
        )
    )
    assert plain == shared
    assert plain[".text.scaled"] != other[".text.scaled"]
    assert plain != smaller  # the same instructions for other launches
