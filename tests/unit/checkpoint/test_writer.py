import json
import shutil

import pytest
import torch
from safetensors import safe_open

from qtool import pipeline
from qtool.checkpoint import stream, writer
from qtool.checkpoint.claim import look
from qtool.checkpoint.place import check_free_space, find_place
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.spool import Made
from qtool.errors import OutputError
from qtool.formats._dtypes import item_bytes
from qtool.modeling.locate import Location
from tests.helpers import file_hashes, normal, recipe
from tests.unit.checkpoint.runs import CONFIG, WEIGHTS, add, open_writer


def test_same_seed_gives_the_same_bytes(llama, tmp_path):
    for name in ("once", "again"):
        pipeline.quantize(Location(llama), tmp_path / name, recipe())
    first, second = file_hashes(tmp_path / "once"), file_hashes(tmp_path / "again")
    first.pop("quantization_report.json")
    second.pop("quantization_report.json")
    assert first == second


def test_checkpoint_holds_what_it_must_and_nothing_of_this_machine(llama, checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", WEIGHTS, "README.md", "tokenizer.json"} <= names
    assert not any(name.endswith((".tmp", ".partial")) for name in names)
    for path in checkpoint.iterdir():
        assert str(llama.parent).encode() not in path.read_bytes()


@pytest.mark.parametrize("limit", [1, 20_000, 60_000])
def test_shards_are_bounded_and_the_index_is_right(llama, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", limit)
    out_dir = tmp_path / "out"
    pipeline.quantize(Location(llama), out_dir, recipe())
    index = json.loads((out_dir / "model.safetensors.index.json").read_text())
    files = sorted(out_dir.glob("*.safetensors"))
    total = 0
    for number, file in enumerate(files, start=1):
        assert file.name == f"model-{number:05d}-of-{len(files):05d}.safetensors"
        pieces = stream.pieces_of(file)
        named = {name for name, where in index["weight_map"].items() if where == file.name}
        assert {piece.name for piece in pieces} == named
        size = sum(piece.num_bytes for piece in pieces)
        assert size <= limit or len({name.rsplit(".", 1)[0] for name in named}) == 1  # one layer
        total += size
    assert index["metadata"]["total_size"] == total


def test_sharded_checkpoint_equals_the_single_file(llama, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 20_000)
    pipeline.quantize(Location(llama), tmp_path / "out", recipe())
    single, sharded = CheckpointReader(checkpoint), CheckpointReader(tmp_path / "out")
    assert sorted(single.names()) == sorted(sharded.names())
    for name in single.names():
        a, b = single.load(name), sharded.load(name)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            assert torch.equal(a, b)
        else:
            assert not isinstance(a, torch.Tensor)
            assert not isinstance(b, torch.Tensor)
            assert all(torch.equal(a.parts[part], b.parts[part]) for part in a.parts)


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path):
    with open_writer(tmp_path / "out") as opened:
        add(opened, "odd", torch.zeros(3, dtype=torch.uint8))
        add(opened, "half", normal(5).half())
        add(opened, "wide", normal(3).double())
        add(opened, "word", torch.arange(3, dtype=torch.int32))
        opened.finish({}, CONFIG)
    for piece in stream.pieces_of(tmp_path / "out" / WEIGHTS):
        assert piece.start % item_bytes(piece.dtype) == 0


def test_existing_checkpoint_is_replaced_only_when_asked(llama, tmp_path):
    out_dir = tmp_path / "out"
    pipeline.quantize(Location(llama), out_dir, recipe())
    (out_dir / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="Pass --overwrite to replace it"):
        pipeline.quantize(Location(llama), out_dir, recipe(num_bits=2))
    with pytest.raises(OutputError, match=r"qtool didn't write: thesis\.txt\. --overwrite"):
        pipeline.quantize(Location(llama), out_dir, recipe(num_bits=2), overwrite=True)
    (out_dir / "thesis.txt").unlink()
    pipeline.quantize(Location(llama), out_dir, recipe(num_bits=2), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_directory_named_like_a_replaced_checkpoint_survives_overwriting(llama, tmp_path):
    out_dir = tmp_path / "out"
    pipeline.quantize(Location(llama), out_dir, recipe())
    shutil.copytree(out_dir, tmp_path / "out.replaced")
    pipeline.quantize(Location(llama), out_dir, recipe(num_bits=2), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.replaced"]


def test_directory_that_is_no_checkpoint_is_never_deleted(tmp_path):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="holds no checkpoint; --overwrite doesn't delete that"):
        look(find_place(precious, overwrite=True, resume=False))
    with pytest.raises(OutputError, match="holds no checkpoint"):
        open_writer(precious, overwrite=True)
    assert (precious / "thesis.tex").is_file()


def test_empty_directory_is_taken_without_asking(tmp_path):
    (tmp_path / "out").mkdir()
    with open_writer(tmp_path / "out") as opened:
        add(opened, "a", normal(2))
        opened.finish({}, CONFIG)
    assert (tmp_path / "out" / "config.json").is_file()


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    for name, message in (("out", "is a file"), ("out/below", "Not a directory|isn't a directory")):
        with pytest.raises(OutputError, match=message):
            look(find_place(tmp_path / name, overwrite=True, resume=False))


def test_too_little_space_is_found_before_any_work(llama, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(OutputError, match=r"0\.00 MB free; writing out takes"):
        pipeline.quantize(Location(llama), tmp_path / "out", recipe())
    assert list(tmp_path.iterdir()) == []
    check_free_space(find_place(tmp_path / "no" / "such" / "parent"), 400, besides=400)
    with pytest.raises(OutputError, match="MB free"):
        check_free_space(find_place(tmp_path / "out"), 400, besides=800)


def test_tensor_name_cannot_leave_the_directory(tmp_path):
    name = "../../../escaped/weight"
    (tmp_path / "escaped").mkdir()
    with open_writer(tmp_path / "deep" / "er" / "out") as opened:
        add(opened, name, normal(2))
        opened.finish({}, CONFIG)
    assert list((tmp_path / "escaped").iterdir()) == []
    with safe_open(tmp_path / "deep" / "er" / "out" / WEIGHTS, framework="pt") as file:
        assert list(file.keys()) == [name]


def test_what_is_stored_is_made_once(tmp_path):
    made = []

    def make() -> Made:
        made.append(1)
        return Made(normal(2), {"seconds": 1.5})

    with pytest.raises(KeyboardInterrupt), open_writer(tmp_path / "out") as opened:
        assert opened.once("a", make) == {"seconds": 1.5}
        raise KeyboardInterrupt
    with open_writer(tmp_path / "out", resume=True) as opened:
        assert opened.once("a", make) == {"seconds": 1.5}
        opened.once("b", make)
        opened.finish({}, CONFIG)
    assert len(made) == 2
    with safe_open(tmp_path / "out" / WEIGHTS, framework="pt") as file:
        assert sorted(file.keys()) == ["a", "b"]
