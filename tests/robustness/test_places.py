"""OUT_DIR as people and scripts give it: a whole checkpoint, nothing else touched; or one line."""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import strategies as st

from qtool import pipeline
from qtool.checkpoint.reader import CheckpointReader
from qtool.modeling.locate import Location
from tests.helpers import recipe
from tests.robustness.child import run_apart
from tests.robustness.fuzzing import fuzz, sizes

NAMES = (
    *("new", "new/", "new/.", "a/b/c", "a/../new", "./new", "..", ".", "", " ", "empty", "empty/"),
    *("empty/..", "empty/../new", "checkpoint", "checkpoint/", "checkpoint/.", "project", "file"),
    *("file/new", "link-to-empty", "link-to-checkpoint", "link-to-project", "link-to-model"),
    *("link-to-file", "dangling", "dangling/new", "loop", "loop/new", "fifo", "model", "model/"),
    *(
        "model/out",
        "model/..",
        "checkpoint/new",
        "project/new",
        "closed/new",
        "closed",
        "/dev/null",
    ),
    *("/dev/null/x", "/proc/x", "~", "new\n", "日本語", "\u202e", "a" * 255, "a" * 256),
    *("a" * 5000, "b/" * 100 + "c", "b/" * 3000, "\x00", "x\x00y", "\udcff", "-", "--", "*", "$x"),
    *("[bold]", "partial-is-mine", "partial-is-file", "partial-is-link", "new.partial"),
    *("new/new/../new", "con", "COM1", ".hidden", "new..", "...", "empty/x", "with-git"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """OUT_DIR and what is said of what is there."""

    name: str
    overwrite: bool = False
    resume: bool = False
    whole_path: bool = False
    """Give it from the root on."""

    def __repr__(self) -> str:
        switches = f"{' --overwrite' * self.overwrite}{' --resume' * self.resume}"
        return f"{self.name!r:.60}{switches}{' from /' * self.whole_path}"


CASES = st.builds(
    Case,
    name=st.sampled_from(NAMES) | st.text(max_size=6).map(lambda text: text.lstrip("/")),
    overwrite=st.booleans(),
    resume=st.sampled_from([False, False, True]),
    whole_path=st.booleans(),
)


@pytest.fixture(scope="module")
def folder(tiny, checkpoint, tmp_path_factory):
    """Return a folder with all that may be in the way, and files that nobody may lose."""
    folder = tmp_path_factory.mktemp("places")
    shutil.copytree(tiny("llama"), folder / "model")
    shutil.copytree(checkpoint, folder / "checkpoint")
    for name in ("empty", "closed", "project", "with-git/.git", "partial-is-mine.partial"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(checkpoint, folder / "with-git", dirs_exist_ok=True)
    (folder / "project/config.json").write_text("{}")
    for name in (
        "project/thesis.txt",
        "partial-is-mine.partial/x",
        "file",
        "partial-is-file.partial",
    ):
        (folder / name).write_text("mine")
    (folder / "with-git/.git/HEAD").write_text("mine")
    for name, target in {
        "dangling": "gone",
        "loop": "loop",
        "partial-is-link.partial": "empty",
    }.items():
        (folder / name).symlink_to(target)
    for name in ("empty", "checkpoint", "project", "model", "file"):
        (folder / f"link-to-{name}").symlink_to(name)
    os.mkfifo(folder / "fifo")
    (folder / "closed").chmod(0o500)
    return folder


def state(folder: Path) -> dict[str, str]:
    """Return what is there: digests of files, targets of links, kinds of the rest."""
    found = {}
    for parent, directories, files in os.walk(folder):
        for name in (*directories, *files):
            path = Path(parent) / name
            if path.is_symlink():
                value = f"link {path.readlink()}"
            elif path.is_file():
                value = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                value = "directory" if path.is_dir() else "other"
            found[str(path.relative_to(folder))] = value
    return found


def below(path: Path, written: str) -> str:
    """Return a path; of the result, which may be called new.partial, only what is inside it."""
    real = Path(os.path.realpath(path))
    return str(real.relative_to(written) if real.is_relative_to(written) else path.name)


MODEL = Location(Path("model"))


def quantized(case: Case, folder: Path, target: Path) -> str | None:
    """Quantize to a place in a copy of the folder, and return what is wrong with what is there."""
    shutil.copytree(folder, target, symlinks=True, ignore=shutil.ignore_patterns("fifo"))
    os.mkfifo(target / "fifo")
    os.environ["HOME"] = str(target / "home")
    os.chdir(target)
    before = state(target)
    name = f"{target}/{case.name}" if case.whole_path else case.name
    out_dir = Path(name)
    try:
        pipeline.quantize(MODEL, out_dir, recipe(), overwrite=case.overwrite, resume=case.resume)
    except Exception:
        changed = dict(before.items() ^ state(target).items())
        if changed:
            raise AssertionError(f"refused, and {min(changed)} is changed or new") from None
        raise
    os.chdir(target)
    CheckpointReader(out_dir)
    written = os.path.realpath(out_dir)
    after = state(target)
    for name, value in before.items():
        inside = os.path.realpath(target / name).startswith(written)
        if after.get(name) != value and not (inside and name.startswith(("checkpoint", "empty"))):
            return f"{name} is changed or gone"
    left = [
        name for name in after if name not in before and "partial" in below(target / name, written)
    ]
    return f"{left[0]} is left" if left else None


@sizes(15)
def test_a_place_gets_a_whole_checkpoint_or_is_left_alone(size, folder, tmp_path):
    target = tmp_path / "here"

    def check(case: Case) -> str | None:
        outcome = run_apart(quantized, case, folder, target)
        shutil.rmtree(target, ignore_errors=True)
        return outcome.complaint or outcome.value

    for name in ("new", "new.partial"):
        assert check(Case(name)) is None
    fuzz(CASES, check, size)
