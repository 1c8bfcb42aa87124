import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qtool import pipeline
from qtool.checkpoint import spool, stream, writer
from qtool.checkpoint.claim import look
from qtool.checkpoint.manifest import Manifest
from qtool.checkpoint.place import check_free_space, find_place
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.writer import CheckpointWriter
from qtool.errors import BackendError, CheckpointError, OutputError
from qtool.stages import solve
from tests.helpers import file_hashes, normal, recipe

WEIGHTS = "model.safetensors"
CONFIG = {"quantization_config": Manifest(tool_version="0", recipe={}, layers={}).to_config()}


class Stop:
    """An `emit` that raises an error after some layers."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        self.after, self.error, self.layers = after, error, 0

    def __call__(self, event: str, _values: object) -> None:
        self.layers += event == "layer"
        if self.layers == self.after:
            raise self.error("on purpose")


def open_writer(out_dir: Path, *, overwrite=False, resume=False, **fingerprint):
    return CheckpointWriter(out_dir, fingerprint=fingerprint, overwrite=overwrite, resume=resume)


def partial(out_dir: Path) -> Path:
    return out_dir.with_name(out_dir.name + ".partial")


WAY_ON = r"3 finished layers are kept in .*out\.partial: the same command with --resume goes on"


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OutputError, OutputError),
        (torch.OutOfMemoryError, BackendError),
        (MemoryError, BackendError),
        (OSError, OutputError),
    ],
)
def test_work_is_kept_after_any_error_and_the_message_says_how_to_go_on(
    llama, checkpoint, tmp_path, error, seen
):
    class Failure(error):  # torch's message for a card says so; its type does on its own
        def __str__(self):
            return "out of memory" if issubclass(error, RuntimeError) else super().__str__()

    out_dir = tmp_path / "out"
    with pytest.raises(seen, match=WAY_ON):
        pipeline.quantize(str(llama), out_dir, recipe(), emit=Stop(3, Failure))
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    pipeline.quantize(str(llama), out_dir, recipe(), resume=True)
    assert file_hashes(out_dir)[WEIGHTS] == file_hashes(checkpoint)[WEIGHTS]


def test_bug_keeps_its_type_and_the_work(llama, tmp_path):
    with pytest.raises(ZeroDivisionError) as caught:
        pipeline.quantize(str(llama), tmp_path / "out", recipe(), emit=Stop(3, ZeroDivisionError))
    assert "--resume goes on" in caught.value.__notes__[0]
    assert partial(tmp_path / "out").is_dir()


def test_error_before_a_layer_is_finished_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match=r"^no$"), open_writer(tmp_path / "out"):
        raise OutputError("no")
    assert list(tmp_path.iterdir()) == []


def test_error_in_the_middle_of_overwriting_keeps_the_old_checkpoint(llama, tmp_path):
    out_dir = tmp_path / "out"
    pipeline.quantize(str(llama), out_dir, recipe())
    before = file_hashes(out_dir)
    with pytest.raises(ZeroDivisionError):
        pipeline.quantize(
            str(llama),
            out_dir,
            recipe(num_bits=2),
            overwrite=True,
            emit=Stop(3, ZeroDivisionError),
        )
    assert file_hashes(out_dir) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]


@pytest.mark.parametrize("after", [1, 7, 14])
def test_interrupted_run_resumes_to_the_same_bytes(llama, checkpoint, tmp_path, after):
    out_dir = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(str(llama), out_dir, recipe(), emit=Stop(after, KeyboardInterrupt))
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not (partial(out_dir) / "config.json").exists()
    done = {p: p.stat().st_mtime_ns for p in (partial(out_dir) / "layers").iterdir()}
    assert len(done) == after
    stopped = Stop(-1, KeyboardInterrupt)
    pipeline.quantize(str(llama), out_dir, recipe(), resume=True, emit=stopped)
    assert stopped.layers == 14  # restored layers are reported as well
    assert not partial(out_dir).exists()
    for name in (WEIGHTS, "config.json"):
        assert file_hashes(out_dir)[name] == file_hashes(checkpoint)[name]


def test_interrupt_while_shards_are_assembled_resumes_to_the_same_bytes(
    llama, tmp_path, monkeypatch
):
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 30_000)
    pipeline.quantize(str(llama), tmp_path / "whole", recipe())
    write_shard = stream.write_shard

    def interrupted(path, *rest):
        if "00002" in path.name:
            raise KeyboardInterrupt
        write_shard(path, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer, "write_shard", interrupted)
        pipeline.quantize(str(llama), tmp_path / "out", recipe())
    with monkeypatch.context() as patch:  # what the first shard holds isn't solved again
        patch.setattr(solve, "load_method", None)
        pipeline.quantize(str(llama), tmp_path / "out", recipe(), resume=True)
    whole, resumed = file_hashes(tmp_path / "whole"), file_hashes(tmp_path / "out")
    assert set(whole) == set(resumed)
    differing = {name for name in whole if whole[name] != resumed[name]}
    assert differing <= {"quantization_report.json"}  # holds times


def test_unfinished_run_is_neither_continued_nor_dropped_without_being_asked(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_writer(tmp_path / "out", a=1) as opened:
        opened.add("a", normal(2))
        raise KeyboardInterrupt
    with pytest.raises(OutputError, match="--resume, or start over with --overwrite"):
        open_writer(tmp_path / "out", a=1)
    assert partial(tmp_path / "out").is_dir()


def test_resuming_another_recipe_is_refused_and_named(llama, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(str(llama), tmp_path / "out", recipe(), emit=Stop(2, KeyboardInterrupt))
    with pytest.raises(OutputError, match="another recipe; resuming would mix two runs"):
        pipeline.quantize(str(llama), tmp_path / "out", recipe(num_bits=3), resume=True)
    pipeline.quantize(str(llama), tmp_path / "out", recipe(num_bits=3), overwrite=True)
    assert {e.scheme.num_bits for e in CheckpointReader(tmp_path / "out").manifest.layers.values()}


def test_strictness_decides_nothing_of_the_result(llama, text_file, tmp_path):
    def asked(*, strict):
        section = {"dataset": str(text_file), "num_samples": 4, "sequence_length": 64}
        return recipe("gptq", calibration={**section, "strict": strict})

    with pytest.raises(KeyboardInterrupt):
        stop = Stop(2, KeyboardInterrupt)
        pipeline.quantize(str(llama), tmp_path / "out", asked(strict=True), emit=stop)
    pipeline.quantize(str(llama), tmp_path / "out", asked(strict=False), resume=True)


def test_same_sizes_with_other_contents_are_another_model(llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(str(model), tmp_path / "out", recipe(), emit=Stop(2, KeyboardInterrupt))
    content = bytearray((model / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (model / WEIGHTS).write_bytes(content)
    with pytest.raises(OutputError, match="another model"):
        pipeline.quantize(str(model), tmp_path / "out", recipe(), resume=True)


def test_resume_without_an_unfinished_run_starts_one(llama, tmp_path):
    pipeline.quantize(str(llama), tmp_path / "out", recipe(), resume=True)
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_same_seed_gives_the_same_bytes(llama, checkpoint, tmp_path):
    pipeline.quantize(str(llama), tmp_path / "again", recipe())
    first, second = file_hashes(checkpoint), file_hashes(tmp_path / "again")
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
    pipeline.quantize(str(llama), out_dir, recipe())
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
    pipeline.quantize(str(llama), tmp_path / "out", recipe())
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
        opened.add("odd", torch.zeros(3, dtype=torch.uint8))
        opened.add("half", normal(5).half())
        opened.add("wide", normal(3).double())
        opened.add("word", torch.arange(3, dtype=torch.int32))
        opened.finish({}, CONFIG)
    for piece in stream.pieces_of(tmp_path / "out" / WEIGHTS):
        assert piece.start % stream.ITEM_BYTES.get(piece.dtype, 1) == 0


def test_existing_checkpoint_is_replaced_only_when_asked(llama, tmp_path):
    out_dir = tmp_path / "out"
    pipeline.quantize(str(llama), out_dir, recipe())
    (out_dir / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="Pass --overwrite to replace it"):
        pipeline.quantize(str(llama), out_dir, recipe(num_bits=2))
    with pytest.raises(OutputError, match=r"qtool didn't write: thesis\.txt\. --overwrite"):
        pipeline.quantize(str(llama), out_dir, recipe(num_bits=2), overwrite=True)
    (out_dir / "thesis.txt").unlink()
    pipeline.quantize(str(llama), out_dir, recipe(num_bits=2), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_directory_named_like_a_replaced_checkpoint_survives_overwriting(llama, tmp_path):
    out_dir = tmp_path / "out"
    pipeline.quantize(str(llama), out_dir, recipe())
    shutil.copytree(out_dir, tmp_path / "out.replaced")
    pipeline.quantize(str(llama), out_dir, recipe(num_bits=2), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.replaced"]


def test_directory_that_is_no_checkpoint_is_never_deleted(tmp_path):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="holds no checkpoint; --overwrite doesn't delete that"):
        look(find_place(precious), overwrite=True, resume=False)
    with pytest.raises(OutputError, match="holds no checkpoint"):
        open_writer(precious, overwrite=True)
    assert (precious / "thesis.tex").is_file()


def test_empty_directory_is_taken_without_asking(tmp_path):
    (tmp_path / "out").mkdir()
    with open_writer(tmp_path / "out") as opened:
        opened.add("a", normal(2))
        opened.finish({}, CONFIG)
    assert (tmp_path / "out" / "config.json").is_file()


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    for name, message in (("out", "is a file"), ("out/below", "Not a directory|isn't a directory")):
        with pytest.raises(OutputError, match=message):
            look(find_place(tmp_path / name), overwrite=True, resume=False)


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "where", "kept"),
    [
        (spool, "save_file", 0),
        (writer, "write_job", 0),
        (writer, "write_shard", 21),
        (writer, "write_json", 21),
        (writer, "publish", 21),
    ],
)
def test_full_disk_is_one_sentence_and_loses_nothing(
    llama, checkpoint, tmp_path, monkeypatch, module, where, kept
):
    with monkeypatch.context() as patch:
        patch.setattr(module, where, full_disk)
        message = rf"disk of .*out is full.*{'goes on' if kept else 'Free some space.$'}"
        with pytest.raises(OutputError, match=message):
            pipeline.quantize(str(llama), tmp_path / "out", recipe())
    assert [path.name for path in tmp_path.iterdir()] == (["out.partial"] if kept else [])
    pipeline.quantize(str(llama), tmp_path / "out", recipe(), resume=True)
    assert file_hashes(tmp_path / "out")[WEIGHTS] == file_hashes(checkpoint)[WEIGHTS]


def test_result_that_cannot_be_read_gets_no_name(tmp_path):
    with (
        pytest.raises(CheckpointError, match="1 finished layer is kept"),
        open_writer(tmp_path / "out") as opened,
    ):
        opened.add("a", normal(2))
        opened.finish({}, {})
    assert not (tmp_path / "out").exists()


def test_full_disk_reported_by_safetensors_is_the_same_sentence(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def fail(*_args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(spool, "save_file", fail)
    with open_writer(tmp_path / "out") as opened, pytest.raises(OutputError, match="is full"):
        opened.add("a", normal(2))


def test_directory_that_vanishes_is_one_sentence(tmp_path):
    with open_writer(tmp_path / "out") as opened:
        shutil.rmtree(partial(tmp_path / "out"))
        with pytest.raises(OutputError, match=r"Can't write .*out: "):
            opened.add("a", normal(2))


def test_too_little_space_is_found_before_any_work(llama, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(OutputError, match=r"0\.00 MB free; writing out takes"):
        pipeline.quantize(str(llama), tmp_path / "out", recipe())
    assert list(tmp_path.iterdir()) == []
    check_free_space(find_place(tmp_path / "no" / "such" / "parent"), 400, besides=400)
    with pytest.raises(OutputError, match="MB free"):
        check_free_space(find_place(tmp_path / "out"), 400, besides=800)


def test_tensor_name_cannot_leave_the_directory(tmp_path):
    name = "../../../escaped/weight"
    (tmp_path / "escaped").mkdir()
    with open_writer(tmp_path / "deep" / "er" / "out") as opened:
        opened.add(name, normal(2))
        opened.finish({}, CONFIG)
    assert list((tmp_path / "escaped").iterdir()) == []
    with safe_open(tmp_path / "deep" / "er" / "out" / WEIGHTS, framework="pt") as file:
        assert list(file.keys()) == [name]


def test_finished_layer_gives_its_notes_back(tmp_path):
    with open_writer(tmp_path / "out") as opened:
        assert opened.finished("a") is None
        opened.add("a", normal(2), {"seconds": 1.5})
        assert opened.finished("a") == {"seconds": 1.5}
