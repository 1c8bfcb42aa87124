"""docs/several-cards.md: its script says on two ranks what it says in one process."""

import os
import subprocess
import sys
from pathlib import Path

from qtool import pipeline
from qtool.modeling.locate import Location
from tests.docs.pages import blocks
from tests.helpers import ROOT, recipe

PAGE = ROOT / "docs/several-cards.md"


def run(*words: str, folder: Path) -> str:
    """Run a program in a folder; return what it prints."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_script_runs_on_two_ranks_and_alone(llama, tmp_path, monkeypatch, capsys):
    pipeline.quantize(Location(llama), tmp_path / "OUT_DIR", recipe())
    (text,) = blocks(PAGE, "python")
    (tmp_path / "answer.py").write_text(text, encoding="utf-8")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = run(sys.executable, *torchrun, "answer.py", folder=tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(text, str(PAGE), "exec"), {})
    assert two == capsys.readouterr().out
    assert len(two.split()) > 5
