"""Shards whose bytes go back into the files they were made of."""

import errno
import os

import pytest
from safetensors.torch import load_file, save_file

from qtool.checkpoint import stream
from tests.helpers import normal


@pytest.fixture
def spooled(tmp_path):
    """A file of one layer that is cut to its header, and the shard that has its bytes."""
    layer, shard = tmp_path / "layer.safetensors", tmp_path / "shard.safetensors"
    save_file({"a": normal(4, 4)}, layer)
    save_file({"a": normal(4, 4)}, shard)
    header = 8 + int.from_bytes(layer.read_bytes()[:8], "little")
    os.truncate(layer, header)
    return layer, shard


def test_layer_gets_its_bytes_back(spooled):
    layer, shard = spooled
    stream.put_back(shard, [layer])
    assert load_file(layer)["a"].equal(normal(4, 4))
    assert not shard.exists()


def test_full_disk_keeps_the_shard_that_alone_has_the_bytes(spooled, monkeypatch):
    layer, shard = spooled

    def full_disk(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_copy", full_disk)
        with pytest.raises(OSError, match="No space left"):
            stream.put_back(shard, [layer])
    stream.put_back(shard, [layer])
    assert load_file(layer)["a"].equal(normal(4, 4))


@pytest.mark.parametrize("length", [0, 2**20, 2**40, 2**60, 2**64 - 1])
def test_damaged_shard_gives_nothing(spooled, length):
    layer, shard = spooled
    before = layer.read_bytes()
    shard.write_bytes(length.to_bytes(8, "little") + b"{}")
    stream.put_back(shard, [layer])
    assert layer.read_bytes() == before
    assert not shard.exists()
