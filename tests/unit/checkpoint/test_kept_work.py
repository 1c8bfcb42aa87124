import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from qtool import pipeline
from qtool.checkpoint import assemble, spool, stream, writer
from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import BackendError, CheckpointError, OutputError
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.steps import solve_table
from qtool.steps.plan import load_method
from tests import families, tiny
from tests.helpers import file_hashes, normal, recipe
from tests.unit.checkpoint.runs import WEIGHTS, Stop, add, open_writer, partial

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
    out_dir = tmp_path / "out"
    with pytest.raises(seen, match=WAY_ON):
        pipeline.quantize(Location(llama), out_dir, recipe(), emit=Stop(3, error))
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    pipeline.quantize(Location(llama), out_dir, recipe(), resume=True)
    assert file_hashes(out_dir)[WEIGHTS] == file_hashes(checkpoint)[WEIGHTS]


def test_a_configuration_with_a_number_that_is_not_finite_is_kept_and_resumed(tmp_path):
    """As configurations of Mamba 2 have it, which transformers 4 has written."""
    source = tmp_path / "source"
    tiny.build("mamba2").save_pretrained(source)
    families.save_tokenizer(source)
    config = json.loads((source / "config.json").read_text())
    config |= {"time_step_limit": [0.0, float("inf")], "time_step_floor": float("nan")}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(OutputError, match=r"1 finished layer is kept"):
        pipeline.quantize(Location(source), tmp_path / "out", recipe(), emit=Stop(1, OutputError))
    pipeline.quantize(Location(source), tmp_path / "out", recipe(), resume=True)
    pipeline.export(tmp_path / "out", tmp_path / "dense", "dense")
    for name in ("out", "dense"):
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert written["time_step_limit"] == [0.0, float("inf")]
        assert isinstance(written["time_step_floor"], float)
        load_model(Location(tmp_path / name), device="cpu")


def test_bug_keeps_its_type_and_the_work(llama, tmp_path):
    with pytest.raises(ZeroDivisionError) as caught:
        pipeline.quantize(
            Location(llama), tmp_path / "out", recipe(), emit=Stop(3, ZeroDivisionError)
        )
    assert "--resume goes on" in caught.value.__notes__[0]
    assert partial(tmp_path / "out").is_dir()


def test_error_before_a_layer_is_finished_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match=r"^no$"), open_writer(tmp_path / "out"):
        raise OutputError("no")
    assert list(tmp_path.iterdir()) == []


def test_error_in_the_middle_of_overwriting_keeps_the_old_checkpoint(llama, tmp_path):
    out_dir = tmp_path / "out"
    pipeline.quantize(Location(llama), out_dir, recipe())
    before = file_hashes(out_dir)
    with pytest.raises(ZeroDivisionError):
        pipeline.quantize(
            Location(llama),
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
        pipeline.quantize(Location(llama), out_dir, recipe(), emit=Stop(after, KeyboardInterrupt))
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not (partial(out_dir) / "config.json").exists()
    done = {p: p.stat().st_mtime_ns for p in (partial(out_dir) / "layers").iterdir()}
    assert len(done) == after
    stopped = Stop(-1, KeyboardInterrupt)
    pipeline.quantize(Location(llama), out_dir, recipe(), resume=True, emit=stopped)
    assert stopped.layers == 14  # restored layers are reported as well
    assert not partial(out_dir).exists()
    for name in (WEIGHTS, "config.json"):
        assert file_hashes(out_dir)[name] == file_hashes(checkpoint)[name]


def test_interrupt_while_shards_are_assembled_resumes_to_the_same_bytes(
    llama, tmp_path, monkeypatch
):
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 30_000)
    pipeline.quantize(Location(llama), tmp_path / "whole", recipe())
    write_shard = stream.write_shard

    def interrupted(path, *rest):
        if "00002" in path.name:
            raise KeyboardInterrupt
        write_shard(path, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(assemble, "write_shard", interrupted)
        pipeline.quantize(Location(llama), tmp_path / "out", recipe())
    with monkeypatch.context() as patch:  # what the first shard holds isn't solved again
        patch.setattr(solve_table, "load_method", None)
        pipeline.quantize(Location(llama), tmp_path / "out", recipe(), resume=True)
    whole, resumed = file_hashes(tmp_path / "whole"), file_hashes(tmp_path / "out")
    assert set(whole) == set(resumed)
    differing = {name for name in whole if whole[name] != resumed[name]}
    assert differing <= {"quantization_report.json"}  # holds times


def test_unfinished_run_is_neither_continued_nor_dropped_without_being_asked(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_writer(tmp_path / "out", a=1) as opened:
        add(opened, "a", normal(2))
        raise KeyboardInterrupt
    with pytest.raises(OutputError, match="--resume, or start over with --overwrite"):
        open_writer(tmp_path / "out", a=1)
    assert partial(tmp_path / "out").is_dir()


def test_resuming_another_recipe_is_refused_and_named(llama, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(
            Location(llama), tmp_path / "out", recipe(), emit=Stop(2, KeyboardInterrupt)
        )
    with pytest.raises(OutputError, match="another recipe; resuming would mix two runs"):
        pipeline.quantize(Location(llama), tmp_path / "out", recipe(num_bits=3), resume=True)
    pipeline.quantize(Location(llama), tmp_path / "out", recipe(num_bits=3), overwrite=True)
    assert {e.scheme.num_bits for e in CheckpointReader(tmp_path / "out").manifest.layers.values()}


def test_strictness_decides_nothing_of_the_result(llama, text_file, tmp_path):
    def asked(*, strict):
        section = {"dataset": str(text_file), "num_samples": 4, "sequence_length": 64}
        return recipe("gptq", calibration={**section, "strict": strict})

    with pytest.raises(KeyboardInterrupt):
        stop = Stop(2, KeyboardInterrupt)
        pipeline.quantize(Location(llama), tmp_path / "out", asked(strict=True), emit=stop)
    pipeline.quantize(Location(llama), tmp_path / "out", asked(strict=False), resume=True)


def test_same_sizes_with_other_contents_are_another_model(llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(
            Location(model), tmp_path / "out", recipe(), emit=Stop(2, KeyboardInterrupt)
        )
    content = bytearray((model / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (model / WEIGHTS).write_bytes(content)
    with pytest.raises(OutputError, match="another model"):
        pipeline.quantize(Location(model), tmp_path / "out", recipe(), resume=True)


def test_resume_without_an_unfinished_run_starts_one(llama, tmp_path):
    pipeline.quantize(Location(llama), tmp_path / "out", recipe(), resume=True)
    assert (tmp_path / "out" / WEIGHTS).is_file()


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "where", "kept"),
    [
        (spool, "save_file", 0),
        (writer, "write_job", 0),
        (assemble, "write_shard", 21),
        (writer, "written_whole", 21),
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
            pipeline.quantize(Location(llama), tmp_path / "out", recipe())
    assert [path.name for path in tmp_path.iterdir()] == (["out.partial"] if kept else [])
    pipeline.quantize(Location(llama), tmp_path / "out", recipe(), resume=True)
    assert file_hashes(tmp_path / "out")[WEIGHTS] == file_hashes(checkpoint)[WEIGHTS]


def test_result_that_cannot_be_read_gets_no_name(tmp_path):
    with (
        pytest.raises(CheckpointError, match="1 finished layer is kept"),
        open_writer(tmp_path / "out") as opened,
    ):
        add(opened, "a", normal(2))
        opened.finish({}, {})
    assert not (tmp_path / "out").exists()


def test_full_disk_reported_by_safetensors_is_the_same_sentence(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def fail(*_args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(spool, "save_file", fail)
    with open_writer(tmp_path / "out") as opened, pytest.raises(OutputError, match="is full"):
        add(opened, "a", normal(2))


def test_directory_that_vanishes_is_one_sentence(tmp_path):
    with open_writer(tmp_path / "out") as opened:
        shutil.rmtree(partial(tmp_path / "out"))
        with pytest.raises(OutputError, match=r"Can't write .*out: "):
            add(opened, "a", normal(2))


def interrupted(llama: Path, out_dir: Path, after: int = 5) -> list[Path]:
    """Stop a run after some layers; return their files."""
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(Location(llama), out_dir, recipe(), emit=Stop(after, KeyboardInterrupt))
    return sorted((partial(out_dir) / "layers").iterdir())


def truncated(content: bytes) -> bytes:
    return content[:50]


def without_data(content: bytes) -> bytes:
    return content[: 8 + int.from_bytes(content[:8], "little")]


def with_a_flipped_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def of_other_dtype(content: bytes) -> bytes:
    return content.replace(b'"dtype":"I32"', b'"dtype":"F32"')


def of_other_notes(content: bytes) -> bytes:
    return content.replace(b"nmse", b"nmsf")


@pytest.mark.parametrize(
    "damage",
    [
        lambda _content: b"",
        lambda _content: b"\xff" * 400,
        truncated,
        without_data,
        with_a_flipped_bit,
        of_other_dtype,
        of_other_notes,
    ],
)
def test_damaged_layer_is_solved_anew_and_all_others_are_kept(
    llama, checkpoint, tmp_path, monkeypatch, damage
):
    files = interrupted(llama, tmp_path / "out")
    damaged = damage(files[2].read_bytes())
    assert damaged != files[2].read_bytes()
    files[2].write_bytes(damaged)
    (files[0].parent / "half.tmp").write_bytes(b"half")
    solved = []

    def load(name):
        solved.append(name)
        return load_method(name)

    monkeypatch.setattr(solve_table, "load_method", load)
    pipeline.quantize(Location(llama), tmp_path / "out", recipe(), resume=True)
    assert len(solved) == 14 - len(files) + 1
    assert file_hashes(tmp_path / "out")[WEIGHTS] == file_hashes(checkpoint)[WEIGHTS]


def test_layer_of_another_name_and_a_folder_are_not_taken(llama, checkpoint, tmp_path):
    files = interrupted(llama, tmp_path / "out")
    same_shape = [path for path in files if "k_proj" in path.name or "v_proj" in path.name]
    shutil.copy(same_shape[0], same_shape[1])
    (files[0].parent / "folder.safetensors").mkdir()
    pipeline.quantize(Location(llama), tmp_path / "out", recipe(), resume=True)
    assert file_hashes(tmp_path / "out")[WEIGHTS] == file_hashes(checkpoint)[WEIGHTS]


def test_run_that_has_ended_is_not_done_again(llama, tmp_path, monkeypatch):
    first = pipeline.quantize(Location(llama), tmp_path / "out", recipe())
    before = file_hashes(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(solve_table, "load_method", None)
        again = pipeline.quantize(Location(llama), tmp_path / "out", recipe(), resume=True)
    assert again == first
    assert file_hashes(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputError, match="Pass --overwrite"):
        pipeline.quantize(Location(llama), tmp_path / "out", recipe(num_bits=3), resume=True)


def test_full_disk_under_the_inputs_of_blocks_is_one_sentence(
    llama, text_file, tmp_path, monkeypatch
):
    section = {"dataset": str(text_file), "num_samples": 4, "sequence_length": 32, "cache": "disk"}
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    with pytest.raises(OutputError, match=r"original\.stream can't get its .*No space left"):
        pipeline.quantize(Location(llama), tmp_path / "out", recipe("gptq", calibration=section))
    assert list(tmp_path.iterdir()) == []
