"""How large values are, as counts that add up: ranges of activations, without keeping these."""

from dataclasses import dataclass

import torch
from torch import Tensor

DROPPED_BITS = 13
"""Of the 31 of a float32's magnitude. What is left, 8 of exponent and 10 of mantissa, tells all
magnitudes of float16 apart."""
BUCKETS = 1 << (31 - DROPPED_BITS)
STEPS_TRIED, NARROWEST = 100, 1 / 32
"""Of a search: steps in geometric progression, and the smallest as a share of the largest."""


@dataclass(frozen=True, slots=True)
class Magnitudes:
    """How often each magnitude occurs, cut to 11 significant bits."""

    counts: Tensor
    """(BUCKETS,) int64, by the leading bits of float32."""

    @staticmethod
    def none(device: torch.device) -> "Magnitudes":
        """Return the counts of no values."""
        return Magnitudes(torch.zeros(BUCKETS, dtype=torch.int64, device=device))

    def add(self, values: Tensor) -> None:
        """Add finite values of any shape and float dtype, in place."""
        bits = values.detach().float().abs().flatten().view(torch.int32)
        self.counts.add_(torch.bincount(bits >> DROPPED_BITS, minlength=BUCKETS))

    def merged(self, other: "Magnitudes") -> "Magnitudes":
        """Return the counts of the values of both."""
        return Magnitudes(self.counts + other.counts)

    def _seen(self) -> tuple[Tensor, Tensor]:
        """Return the magnitudes that occur, ascending, and how often: (kinds,) float64, int64."""
        found = self.counts.nonzero().squeeze(1)
        values = (found.to(torch.int32) << DROPPED_BITS).view(torch.float32)
        return values.double(), self.counts[found]

    def largest(self) -> float:
        """Return the largest magnitude; 0 of no values."""
        values, _ = self._seen()
        return float(values[-1]) if len(values) else 0.0

    def percentile(self, percent: float) -> float:
        """Return the smallest magnitude that at least `percent` of all values don't exceed."""
        values, counts = self._seen()
        if not len(values):
            return 0.0
        shares = counts.cumsum(0).double() / counts.sum()
        place = int(torch.searchsorted(shares, percent / 100 * (1 - 1e-12)))
        return float(values[min(place, len(values) - 1)])

    def best_range(self, largest_code: int) -> float:
        """Return the range whose codes have the least squared error; of those tried, see above.

        Codes are whole numbers to `largest_code` at most, the range is that times the step.
        """
        values, counts = self._seen()
        largest = self.largest()
        shares = NARROWEST ** torch.linspace(0, 1, STEPS_TRIED, dtype=torch.float64)
        errors = []
        for share in shares.tolist():
            step = max(share * largest / largest_code, torch.finfo(torch.float64).tiny)
            codes = (values / step).round().clamp(max=largest_code)
            errors.append(float(((values - step * codes).square() * counts).sum()))
        return float(shares[errors.index(min(errors))]) * largest
