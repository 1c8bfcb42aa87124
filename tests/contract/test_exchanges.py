"""What every exchange must do: found by file name, so a new one is tested without an edit here."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qtool import pipeline
from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import CheckpointError
from qtool.exchange import exchange_names, exchange_of, load_exchange
from qtool.modeling.locate import Location
from qtool.pipeline.export import export
from tests.helpers import recipe

EXCHANGES = exchange_names()
WRITERS = [name for name in EXCHANGES if load_exchange(name).write is not None]
READERS = [name for name in EXCHANGES if load_exchange(name).read is not None]
SCHEMES: dict[str, dict[str, Any]] = {
    "4 bits symmetric": {"num_bits": 4, "group_size": 32, "symmetric": True},
    "4 bits": {"num_bits": 4, "group_size": 32},
    "8 bits symmetric": {"num_bits": 8, "group_size": 32, "symmetric": True},
    "5 bits per row": {"num_bits": 5, "group_size": None},
    "short last group": {"num_bits": 4, "group_size": 48, "symmetric": True},
}


@pytest.fixture(scope="module")
def checkpoints(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchanged")
    for number, scheme in enumerate(SCHEMES.values()):
        wanted = recipe().model_copy(deep=True)
        section = wanted.weights.scheme.model_copy(update=scheme)
        weights = wanted.weights.model_copy(update={"scheme": section})
        wanted = wanted.model_copy(update={"weights": weights})
        pipeline.quantize(Location(llama), folder / str(number), wanted)
    return {name: folder / str(number) for number, name in enumerate(SCHEMES)}


@pytest.mark.parametrize("name", EXCHANGES)
def test_summary_is_one_sentence(name):
    summary = load_exchange(name).summary
    assert summary.endswith(".")
    assert "\n" not in summary


@pytest.mark.parametrize("name", EXCHANGES)
def test_it_reads_or_writes_and_whoever_writes_says_what_it_refuses_and_compares(name):
    exchange = load_exchange(name)
    assert exchange.read or exchange.write
    can = {exchange.write is not None, exchange.compare is not None, exchange.refuses is not None}
    assert len(can) == 1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", WRITERS)
def test_a_checkpoint_is_written_exactly_or_refused_before_anything_is(
    name, scheme, checkpoints, tmp_path
):
    suffix = load_exchange(name).suffix or ""
    dest = tmp_path / f"result{suffix}"
    try:
        result = export(checkpoints[scheme], dest, name)
    except CheckpointError as error:
        assert not list(tmp_path.iterdir())
        assert "model.layers.0" in str(error) or name in str(error)
        assert "--target dense" in str(error)
        return
    assert result.compared.layers == len(CheckpointReader(checkpoints[scheme]).manifest.layers)
    assert result.num_bytes > 0
    if name in READERS:
        check_reads_back(name, checkpoints[scheme], dest)


def check_reads_back(name, directory, dest):
    assert exchange_of(dest) == name
    read = load_exchange(name).read
    assert read is not None
    found, ours = read(dest), CheckpointReader(directory)
    assert set(found.layers) | set(found.tied) == set(ours.manifest.layers)
    for layer, load in found.layers.items():
        expected = ours.load(layer)
        assert isinstance(expected, QuantizedTensor)
        one, other = (
            codec(each.format).dequantize(each, torch.float64) for each in (load(), expected)
        )
        assert torch.equal(one, other), layer
    for full, load_plain in found.others.items():
        plain = ours.load(full)
        assert isinstance(plain, Tensor)
        assert torch.equal(load_plain().float(), plain.float()), full


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_such_model_is_refused_in_one_line(name, tmp_path):
    exchange = load_exchange(name)
    path = tmp_path / f"broken{exchange.suffix or ''}"
    if exchange.suffix:
        path.write_bytes(b"nothing of the kind")
    else:
        path.mkdir()
        (path / "config.json").write_text(
            f'{{"quantization_config": {{"quant_method": "{exchange.quant_method}"}}}}'
        )
    assert exchange_of(path) == name
    assert exchange.read is not None
    with pytest.raises(CheckpointError) as caught:
        exchange.read(path)
    assert "\n" not in str(caught.value)
