"""Adding up what slabs of in_features left of a product: kernels/add_splits.cu."""

from torch import Tensor

from qtool.runtime.backends.cuda.launch import KernelCall, Launch, constants
from qtool.runtime.backends.cuda.planes import EPILOGUES, Target


def add_splits(
    partial: Tensor,
    target: Target,
    launch: Launch,
    *,
    epilogue: str = "none",
    residual: Tensor | None = None,
) -> None:
    """Write the sum of (splits, tokens, padded rows) float32 to a target, through the epilogue."""
    (splits, batch, padded), y, places = partial.shape, target.y, target.places
    threads, outputs = 128, y.shape[1] if places is None else len(places)
    macros, grid = (
        constants(y.dtype, EPILOGUE=EPILOGUES[epilogue]),
        (-(-outputs // threads), batch, 1),
    )
    numbers = (outputs, padded, batch, splits, target.width)
    call = KernelCall("add_splits", "add_splits", macros, grid, threads, 0, numbers)
    launch(call, (partial, residual, y, places))
