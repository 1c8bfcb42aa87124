"""How far two distributions are apart."""

import torch
from torch import Tensor


def kl_divergences(original: Tensor, quantized: Tensor) -> Tensor:
    """Return KL(original || quantized) per row, (rows,) float64, of (rows, vocabulary) log p.

    Rounded log-probabilities don't quite sum to one, and a plain KL could turn negative. The sum of
    p (log p - log q) - p + q is the same where both do, and has no negative term.
    """
    log_p, log_q = original.double(), quantized.double()
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0)  # 0 log 0 is 0, not NaN
    return (terms - p + log_q.exp()).sum(1)
