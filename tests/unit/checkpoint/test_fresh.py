"""What is made at once and replaces nothing: nobody's folder is lost, and two don't meet."""

import fcntl
import os
from pathlib import Path

import pytest

from qtool.checkpoint.fresh import MADE_AT_ONCE, made_fresh
from qtool.checkpoint.marks import Job, write_job
from qtool.errors import OutputError


def make(dest: Path) -> None:
    with made_fresh(dest) as made:
        made.mkdir()
        (made / "config.json").write_text("{}")


def left_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_it_arrives_alone_as_a_directory_or_a_file(tmp_path):
    make(tmp_path / "a" / "out")
    with made_fresh(tmp_path / "out.gguf") as made:
        made.write_text("GGUF")
    assert left_in(tmp_path) == {"a", "a/out", "a/out/config.json", "out.gguf"}


@pytest.mark.parametrize("name", ["out.partial", ".out.partial"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_a_user_calls_so_is_not_lost(kind, name, tmp_path):
    (tmp_path / "mine").mkdir()
    mine = tmp_path / name
    if kind == "file":
        mine.write_text("thesis")
    elif kind == "link":
        mine.symlink_to("mine")
    else:
        mine.mkdir()
        (mine / "thesis.txt").write_text("years")
    before = left_in(tmp_path)
    if name == "out.partial":
        with pytest.raises(OutputError, match=r"out\.partial, where the work would go"):
            make(tmp_path / "out")
        assert left_in(tmp_path) == before
    else:
        make(tmp_path / "out")
        assert left_in(tmp_path) == before | {"out", "out/config.json"}


def test_what_a_killed_process_left_is_dropped_and_a_run_that_can_go_on_is_not(tmp_path):
    work = tmp_path / "out.partial"
    work.mkdir()
    make(tmp_path / "out")  # killed before it had marked the folder
    (tmp_path / "out").rename(tmp_path / "old")
    (work / "result").mkdir(parents=True)
    (work / "result" / "half").touch()
    write_job(work, Job(fingerprint=MADE_AT_ONCE))
    make(tmp_path / "out")
    assert left_in(tmp_path / "out") == {"config.json"}
    assert not work.exists()
    (tmp_path / "other.partial" / "layers").mkdir(parents=True)
    write_job(tmp_path / "other.partial", Job(fingerprint={"recipe": "hours"}))
    with pytest.raises(OutputError, match="unfinished run of another command"):
        make(tmp_path / "other")
    assert left_in(tmp_path / "other.partial") == {"job.json", "layers"}


def test_a_second_one_is_refused_while_the_first_lives(tmp_path):
    with made_fresh(tmp_path / "out") as made:
        made.write_text("first")
        with pytest.raises(OutputError, match="Another run is writing"):
            make(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "first"


@pytest.mark.parametrize(
    "name", ["there", "there/..", ".", "x/..", "file", "link", "dangling", "file/x", "/", "x\n"]
)
def test_a_place_that_is_taken_is_refused_before_the_work(name, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    before = left_in(tmp_path)
    with pytest.raises(OutputError), made_fresh(Path(name)):
        pytest.fail("the work was begun")
    assert left_in(tmp_path) == before


def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), made_fresh(tmp_path / "out") as made:
        made.mkdir()
        raise KeyboardInterrupt
    assert left_in(tmp_path) == set()


def test_an_interruption_while_it_gets_its_name_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "out")
    assert left_in(tmp_path) == set()


def test_a_disk_that_fails_at_the_very_end_is_one_sentence(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qtool.checkpoint.fresh.sync", full)
    with pytest.raises(OutputError, match=r"disk of .*out is full"):
        make(tmp_path / "out")
    assert left_in(tmp_path) == {"out", "out/config.json"}


def test_a_name_that_cannot_be_given_costs_nothing(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OutputError, match=r"can't get its name: Operation not permitted"):
        make(tmp_path / "out")
    assert left_in(tmp_path) == {
        "out.partial",
        *(f"out.partial/result{n}" for n in ("", "/config.json")),
    }


def test_a_name_that_is_taken_at_the_end_costs_neither_of_the_two(tmp_path):
    with (
        pytest.raises(OutputError, match=r"exists by now. What was made is whole, and stays in"),
        made_fresh(tmp_path / "out") as made,
    ):
        made.write_text("hours")
        (tmp_path / "out").write_text("mine")
    assert (tmp_path / "out").read_text() == "mine"
    assert made.read_text() == "hours"
    (tmp_path / "out").unlink()
    with pytest.raises(OutputError, match="where the work would go, isn't the work"):
        make(tmp_path / "out")
    assert made.read_text() == "hours"


def test_others_files_in_the_work_folder_stay(tmp_path):
    with made_fresh(tmp_path / "out") as made:
        made.touch()
        (made.parent / "notes.txt").write_text("mine")
    assert left_in(tmp_path) == {"out", "out.partial", "out.partial/notes.txt"}


def test_a_lock_that_another_holds_is_waited_for_no_longer_than_it_takes(tmp_path):
    work = tmp_path / "out.partial"
    work.mkdir()
    descriptor = os.open(work, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="Another run is writing"):
        make(tmp_path / "out")
    os.close(descriptor)
    make(tmp_path / "out")
