"""Where a result may go, and what is refused before any work is done."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from qtool import pipeline
from qtool.checkpoint import place as place_module
from qtool.checkpoint.apart import check_apart
from qtool.checkpoint.claim import look
from qtool.checkpoint.marks import Job, read_job, write_job
from qtool.checkpoint.place import find_place, is_mount_point
from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import OutputError
from qtool.modeling.locate import Location
from tests.helpers import file_hashes, normal, recipe
from tests.unit.checkpoint.runs import add, open_writer

FLAGS = [(False, False), (True, False), (False, True)]


def refused(out_dir: Path, message: str, *, overwrite: bool = True) -> None:
    with pytest.raises(OutputError, match=message) as caught:
        look(find_place(out_dir, overwrite=overwrite, resume=False))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [".", "sub/..", "a/../b", "out/", "./c/.//d"])
def test_odd_spellings_are_resolved(llama, tmp_path, monkeypatch, text):
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    (here / "a").mkdir()
    if text in (".", "sub/.."):
        shutil.rmtree(here / "a")
    if text == ".":
        shutil.rmtree(here / "sub")
    monkeypatch.chdir(here)
    if text == "sub/..":  # `sub` is no part of a checkpoint
        refused(Path(text), "holds no checkpoint")
        return
    pipeline.quantize(Location(llama), Path(text), recipe())
    assert CheckpointReader(Path(text)).manifest.layers
    assert not list(tmp_path.rglob("*partial*"))


def test_directory_one_stands_in_stays_the_same(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = Path().stat().st_ino
    pipeline.quantize(Location(llama), Path(), recipe())
    assert Path().stat().st_ino == before
    assert Path("config.json").is_file()


def test_home_is_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_place(Path("~/out")).out_dir == tmp_path.resolve() / "out"


def test_link_to_a_directory_stays_a_link(llama, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to("big")
    pipeline.quantize(Location(llama), tmp_path / "link", recipe())
    pipeline.quantize(Location(llama), tmp_path / "link", recipe(num_bits=3), overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "big" / "config.json").is_file()


@pytest.mark.parametrize("below", ["", "sub"])
def test_link_to_nothing_is_refused(tmp_path, below):
    (tmp_path / "link").symlink_to("unmounted")
    refused(tmp_path / "link" / below, "is a link to .*unmounted, which doesn't exist")


def test_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", "loop")


@pytest.mark.parametrize("name", ["x" * 240, "日" * 80, "x" * 300, "a\nb", "a\udcffb", "a\0b"])
def test_name_that_cannot_be_one_is_refused(tmp_path, name):
    refused(tmp_path / name, "too long|control characters|isn't UTF-8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 5000, "b/" * 3000])
def test_endless_name_is_not_repeated_in_full(tmp_path, name):
    with pytest.raises(OutputError, match="too long") as caught:
        look(find_place(tmp_path / name, overwrite=False, resume=False))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("out_dir", ["/", "/proc", "/dev/null", "/dev/null/x"])
def test_places_of_the_system_are_refused(out_dir):
    refused(Path(out_dir), "holds no checkpoint|is a file|Not a directory|can be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_closed_folder_is_refused(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    refused(tmp_path / "out", "isn't a directory that can be written")
    tmp_path.chmod(stat.S_IRWXU)


def test_mount_point_is_written_inside_and_replaced_file_by_file(
    llama, tmp_path, tmp_path_factory, monkeypatch
):
    checkpoint = tmp_path_factory.mktemp("elsewhere") / "out"
    pipeline.quantize(Location(llama), checkpoint, recipe())
    out_dir = tmp_path.resolve() / "mnt"
    (out_dir / "lost+found").mkdir(parents=True)
    before = out_dir.stat().st_ino
    monkeypatch.setattr(place_module, "is_mount_point", lambda path: path == out_dir)
    pipeline.quantize(Location(llama), out_dir, recipe(num_bits=3))
    pipeline.quantize(Location(llama), out_dir, recipe(), overwrite=True)
    assert out_dir.stat().st_ino == before
    (out_dir / "lost+found").rmdir()
    for name, digest in file_hashes(checkpoint).items():
        if name != "quantization_report.json":
            assert file_hashes(out_dir)[name] == digest
    assert {path.name for path in tmp_path.iterdir()} == {"mnt"}
    assert {path.name for path in out_dir.iterdir()} == {path.name for path in checkpoint.iterdir()}


def test_what_is_a_mount_point(tmp_path):
    assert is_mount_point(Path("/"))
    assert not is_mount_point(tmp_path)


@pytest.mark.parametrize(
    "foreign", ["thesis.tex", "results.json", ".git/HEAD", "notes", "a/b/c.txt"]
)
def test_checkpoint_with_anything_else_in_it_is_not_replaced(checkpoint, tmp_path, foreign):
    out_dir = Path(shutil.copytree(checkpoint, tmp_path / "out"))
    look(find_place(out_dir, overwrite=True, resume=False))
    if "." in foreign:
        (out_dir / foreign).parent.mkdir(parents=True, exist_ok=True)
        (out_dir / foreign).write_text("mine")
    else:
        (out_dir / foreign).mkdir()
    refused(out_dir, f"holds what qtool didn't write: {foreign}")


@pytest.mark.parametrize(
    "content", ["{}", "[]", "null", "", '{"quantization_config": 7}', "[" * 9999]
)
def test_directory_without_our_mark_is_not_replaced(tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(content)
    refused(tmp_path / "out", "holds no checkpoint; --overwrite doesn't delete that")


def test_damaged_checkpoint_of_ours_is_replaced(llama, checkpoint, tmp_path):
    out_dir = Path(shutil.copytree(checkpoint, tmp_path / "out"))
    (out_dir / "model.safetensors").write_bytes(b"")
    (out_dir / "config.json").write_text((out_dir / "config.json").read_text()[:-40])
    pipeline.quantize(Location(llama), out_dir, recipe(), overwrite=True)
    assert CheckpointReader(out_dir).manifest.layers


@pytest.mark.parametrize("left", ["folder", "file", "link", "job", "job alone"])
def test_what_only_has_the_name_of_our_work_is_left_alone(llama, tmp_path, left):
    work = tmp_path / "out.partial"
    if left == "file":
        work.write_text("mine")
    elif left == "link":
        (tmp_path / "mine").mkdir()
        write_job(tmp_path / "mine", Job(fingerprint={}))
        work.symlink_to("mine")
    elif left == "job alone":
        work.mkdir()
        (work / "job.json").write_text('{"fingerprint": "mine"}')
    else:
        work.mkdir()
        (work / "mine.txt").write_text("mine")
        if left == "job":
            (work / "job.json").write_text('{"fingerprint": {}}')
    for overwrite, resume in FLAGS:
        with pytest.raises(OutputError, match=r"out\.partial, where the work would go"):
            pipeline.quantize(
                Location(llama), tmp_path / "out", recipe(), overwrite=overwrite, resume=resume
            )
    assert work.is_symlink() or "mine" in "".join(
        p.read_text() for p in (work, *work.glob("*")) if p.is_file()
    )


def test_second_run_is_refused_while_the_first_lives(tmp_path):
    with open_writer(tmp_path / "out") as first:
        add(first, "a", normal(2))
        for overwrite, resume in FLAGS:
            with pytest.raises(OutputError, match="Another run is writing") as caught:
                open_writer(tmp_path / "out", overwrite=overwrite, resume=resume)
            assert "--overwrite" not in str(caught.value)
    assert read_job(tmp_path / "out.partial") is not None


def test_result_in_above_or_instead_of_the_model_is_refused(llama, tmp_path):
    model = Path(shutil.copytree(llama, tmp_path / "a" / "model"))
    (tmp_path / "link").symlink_to(model)
    for out_dir in (model, model / "q", tmp_path / "link", tmp_path / "link" / "q", tmp_path / "a"):
        for source in (model, tmp_path / "link"):
            with pytest.raises(OutputError, match="lies in"):
                pipeline.quantize(Location(source), out_dir, recipe(), overwrite=True)
    assert file_hashes(model) == file_hashes(llama)


def test_model_of_links_into_the_result_is_refused(llama, tmp_path):
    real = Path(shutil.copytree(llama, tmp_path / "blobs"))
    (tmp_path / "snapshot").mkdir()
    for path in real.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    with pytest.raises(OutputError, match="is read by this run"):
        check_apart(real, tmp_path / "snapshot")


def test_a_gguf_file_is_apart_from_all_but_what_holds_it(tmp_path):
    file = tmp_path / "models" / "m.gguf"
    file.parent.mkdir()
    file.write_bytes(b"x")
    check_apart(tmp_path / "models" / "out", file)
    with pytest.raises(OutputError, match=r"m\.gguf is read by this run"):
        check_apart(tmp_path / "models", file)
