"""Peers that need no card: one that is right, and ways to be wrong."""

import os
import sys

import torch

from qtool.timing.peers._peer import Peer, PeerWeight


def right(weight):
    rounded = weight.mul(64).round().div(64)
    sys.stdout.write("a library says something\n")
    return PeerWeight(lambda x: x @ rounded.T, 500, lambda: rounded)


def silent(weight):
    return PeerWeight(lambda x: x @ weight.T, 500)


def elsewhere(weight):
    """Multiply by other rows than its codes say."""
    return PeerWeight(lambda x: x @ weight.roll(1, 0).T, 500, lambda: weight)


def lossy(weight):
    """Keep codes of something else."""
    other = weight.roll(1, 0)
    return PeerWeight(lambda x: x @ other.T, 500, lambda: other)


def broken(weight):
    """Return what isn't a number."""
    return PeerWeight(lambda x: (x @ weight.T).mul(torch.nan), 500, lambda: weight)


def crashing(weight):
    if len(weight) == 96:
        os.abort()
    return right(weight)


def failing(_weight):
    raise RuntimeError("no\nkernel image")


PEERS = tuple(
    Peer(made.__name__, made, multiple=32)
    for made in (right, silent, elsewhere, lossy, broken, crashing, failing)
)
