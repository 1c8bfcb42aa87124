"""Run the command line in this process: as a user sees it, without the wait."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRESS = re.compile(r"\[\d\d:\d\d:\d\d\] ")


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """Lines of stderr, without those on progress."""
        return [line for line in self.err.splitlines() if not PROGRESS.match(line)]


Cli = Callable[..., Done]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Return a function that runs `qtool ARGUMENTS`."""
    from qtool.cli.app import main

    def run(*arguments: object) -> Done:
        monkeypatch.setattr("sys.argv", ["qtool", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code: object = 0
        except SystemExit as stop:
            code = stop.code
        assert code is None or isinstance(code, int)
        captured = capsys.readouterr()
        return Done(code or 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def exported(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint, `w4`, and the same exported, `gptq`."""
    from qtool import pipeline
    from qtool.modeling.locate import Location
    from qtool.recipe.load import recipe_from_mapping

    folder = tmp_path_factory.mktemp("exported")
    scheme = {"num_bits": 4, "group_size": 32, "symmetric": True}
    wanted = recipe_from_mapping({"weights": {"method": "rtn", "scheme": scheme}})
    pipeline.quantize(Location(llama), folder / "w4", wanted)
    pipeline.export(folder / "w4", folder / "gptq", "gptq")
    return folder
