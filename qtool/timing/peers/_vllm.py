"""The compiled operators of vLLM, without vLLM itself: they need torch alone.

Source: vllm 0.33, `_custom_ops.py` and `kernels/linear/mixed_precision`.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.errors import BackendError
from qtool.timing.peers._peer import PeerWeight, of_groups, stored_size

VLLM_LIBRARY = "_C_stable_libtorch.abi3.so"
"""Built for the stable interface of torch: later ones load it too."""
UINT4_MIDDLE_8 = 4 << 8 | 8 << 17 | 1 << 50
"""Their number for 4 bits without a sign whose 8 means zero: mantissa bits, bias, IEEE's NaN."""
CODES_PER_WORD, MARLIN_BITS = 8, 4


def vllm_operators() -> Any:  # noqa: ANN401 - operators of torch have no type
    """Return vLLM's operators.

    Raises:
        BackendError: the vLLM here has no such library, or this torch can't load it.
    """
    spec = importlib.util.find_spec("vllm")
    folders = spec.submodule_search_locations if spec else None
    found = [path for each in folders or () if (path := Path(each, VLLM_LIBRARY)).is_file()]
    if not found:
        raise BackendError(f"vllm has no {VLLM_LIBRARY}. Install vllm 0.33 or one that has it.")
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        raise BackendError(f"torch {torch.__version__} can't load {found[0]}: {error}") from error
    return torch.ops._C


def packed_inputs(codes: Tensor) -> Tensor:
    """Pack 4-bit codes (out_features, in_features) to (in_features / 8, out_features) int32.

    Eight inputs are a word, the first lowest, as GPTQ packs them.
    """
    shifts = torch.arange(
        0, CODES_PER_WORD * MARLIN_BITS, MARLIN_BITS, device=codes.device, dtype=torch.int32
    )
    words = codes.T.unflatten(0, (-1, CODES_PER_WORD)).int() << shifts.view(1, -1, 1)
    return words.sum(1, dtype=torch.int32)


def symmetric_weight(
    matmul: Callable[[Tensor], object],
    packed: tuple[Tensor, Tensor],
    codes: Tensor,
    scales: Tensor,
) -> PeerWeight:
    """Return a weight of 4-bit codes of which 8 means zero.

    Args:
        matmul: Multiplies by it.
        packed: Words and scales as the kernel keeps them.
        codes: (out_features, in_features), as `symmetric_codes` returns them.
        scales: (out_features, groups), likewise.
    """
    middle = 2 ** (MARLIN_BITS - 1)
    return PeerWeight(
        matmul,
        stored_size(*packed),
        lambda: of_groups(codes, scales, -middle * scales.float()),
    )
