"""What a table answers where a model's own code asks its weight: for dtype and device, no more."""

from typing import Any

import torch
from torch import Tensor, nn


class AskedWeight(nn.Module):
    """A quantized table, or the head that shares it; Llama 4 and Mamba ask what their weight is.

    While a model is loaded `vars` hold something that transformers may initialize.
    """

    @property
    def weight(self) -> Tensor:
        """Return a tensor without values: they are quantized."""
        held: Tensor | None = vars(self).get("weight")
        if held is not None:
            return held
        table: Any = vars(self).get("_embedding", (self,))[0]
        return torch.empty(0, dtype=table.dtype, device=table.device)
