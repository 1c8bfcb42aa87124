"""Draw the tokens of a batch on a card by a graph per number of rows: its launches cost nothing."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.runtime.decode.captured import recorded, warm_up
from qtool.runtime.decode.slots import widths
from qtool.serving.sampling import draw_tokens

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Buffers:
    """What graphs read and write, of as many rows as there are slots."""

    logits: Tensor
    likeliest: Tensor
    options: Tensor
    tokens: Tensor

    def fill(self, logits: Tensor, likeliest: Tensor, options: Tensor) -> None:
        """Copy what the next replay reads; rows after these stay what they are."""
        self.logits[: len(logits)] = logits
        self.likeliest[: len(logits)] = likeliest
        self.options[: len(logits)].copy_(options, non_blocking=True)

    def draw(self, rows: int) -> Tensor:
        """Return tokens of the first rows."""
        parts = (self.logits[:rows], self.likeliest[:rows], self.options[:rows])
        self.tokens[:rows] = draw_tokens(*parts)
        return self.tokens[:rows]


class TokenDrawer:
    """Draws as `draw_tokens` does, of logits of one vocabulary and dtype, on any device."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._widths, self._device = widths(slots), device
        self.on_card = device.type == "cuda"
        """Whether graphs are used: not where one can't be recorded."""
        self._buffers: _Buffers | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def __call__(self, logits: Tensor, likeliest: Tensor, options: Tensor) -> Tensor:
        """Return a token of each row; see `draw_tokens`."""
        self.prepare(logits)
        if not self.on_card:
            return draw_tokens(logits, likeliest, options)
        assert self._buffers is not None
        self._buffers.fill(logits, likeliest, options)
        rows = len(logits)
        self._graphs[next(width for width in self._widths if width >= rows)].replay()
        return self._buffers.tokens[:rows].clone()  # the next replay writes over it

    @torch.no_grad()
    def prepare(self, logits: Tensor) -> None:
        """Record the graphs, unless that was done, for logits like these."""
        if not self.on_card or self._buffers is not None:
            return
        try:
            self._buffers = self._made(logits)
            pool = torch.cuda.graph_pool_handle()
            for rows in self._widths:
                self._record(self._buffers, rows, pool)
        except RuntimeError:
            _LOG.warning("tokens are drawn without a CUDA graph, which takes longer", exc_info=True)
            self.on_card, self._buffers, self._graphs = False, None, {}

    def _made(self, logits: Tensor) -> _Buffers:
        """Return buffers whose rows can all be drawn from, whatever they stand for."""
        rows = self._widths[-1]
        with torch.inference_mode(mode=False):
            zeros = torch.zeros(rows, dtype=torch.int64, device=self._device)
            ones = torch.ones(rows, 4, dtype=torch.float64, device=self._device)
            empty = torch.zeros(rows, logits.shape[1], dtype=logits.dtype, device=self._device)
            return _Buffers(empty, zeros, ones, zeros.clone())

    def _record(self, buffers: _Buffers, rows: int, pool: Any) -> None:  # noqa: ANN401
        warm_up(lambda: buffers.draw(rows), self._device)
        graph, _ = recorded(lambda: buffers.draw(rows), self._device, pool)
        self._graphs[rows] = graph
