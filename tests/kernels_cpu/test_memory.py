"""A weight is in memory once: what it was packed from waits in the file that it is mapped from."""

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qtool.checkpoint.manifest import LayerEntry
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.host_memory import let_go_of_pages
from qtool.runtime.modules import QuantizedLinear
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor

STATES = Path("/proc/self/pagemap")
SHAPE, SCHEME = Shape2D(512, 1024), WeightScheme(num_bits=4, group_size=32)
pytestmark = pytest.mark.skipif(not STATES.exists(), reason="the system doesn't list its pages")


def pages_there(tensor: torch.Tensor) -> int:
    """Return how many of the pages that a tensor has alone are in memory."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE)
    count = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first
    assert count > 0, "too small for this test"
    with STATES.open("rb") as file:
        file.seek(8 * first)
        states = np.frombuffer(file.read(8 * count), np.uint64)
    return int((states >> np.uint64(63)).sum())


def mapped(folder: Path, values: torch.Tensor) -> torch.Tensor:
    values.numpy().tofile(folder / "values")
    return torch.from_file(str(folder / "values"), shared=False, size=values.numel())


def test_pages_go_and_come_back(tmp_path):
    values = torch.randn(2**18)
    tensor = mapped(tmp_path, values)
    assert tensor.equal(values)
    assert pages_there(tensor) > 200
    let_go_of_pages([tensor])
    assert pages_there(tensor) == 0
    assert tensor.equal(values)


def test_what_was_written_stays(tmp_path):
    values = torch.randn(2**18)
    tensor, alone = mapped(tmp_path, values), values.clone()
    tensor[100_000] = values[100_000] = 7
    alone[100_000] = 7
    let_go_of_pages([tensor, alone])
    assert tensor.equal(values)
    assert alone.equal(values)


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_a_weight_is_there_once(tmp_path, backend):
    parts = random_tensor("binary_coding", SCHEME, SHAPE, 0).parts
    save_file(dict(parts), tmp_path / "weight.safetensors")
    entry = LayerEntry(format="binary_coding", scheme=SCHEME, shape=SHAPE, method="rtn")
    x, results, linear = torch.randn(3, SHAPE.in_features), {}, QuantizedLinear(entry, None)
    for name in ("reference", backend):
        with use_backend(name), safe_open(tmp_path / "weight.safetensors", "pt") as file:
            linear = QuantizedLinear(entry, None)
            for part in parts:
                setattr(linear, part, file.get_slice(part)[...])
                linear.get_buffer(part).sum()
            results[name] = linear(x)
    waiting = {name: part for name, part in linear.named_buffers() if part.nbytes > 2**16}
    assert waiting
    assert not sum(map(pages_there, waiting.values()))
    error = (results[backend] - results["reference"]).norm() / results["reference"].norm()
    assert error < 1e-4
    for name, part in linear.state_dict().items():
        assert part.equal(parts[name])
