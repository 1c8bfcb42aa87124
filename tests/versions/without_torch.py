"""What another Python can say of qtool where there is no torch for it: all of it that needs none.

    python -W error tests/versions/without_torch.py

Wheels of torch for a second Python would bring gigabytes of CUDA into each run of CI.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Compile every file, load every recipe, ask for help."""
    files = [
        path for folder in ("qtool", "tests", "docs") for path in (ROOT / folder).rglob("*.py")
    ]
    for path in files:
        compile(path.read_text(encoding="utf-8"), str(path), "exec")

    from typer.testing import CliRunner

    from qtool import resources
    from qtool.cli.app import app
    from qtool.recipe.load import load_recipe

    paths = sorted(resources.recipes_dir().rglob("*.yaml"))
    recipes = [load_recipe(str(path)) for path in paths]
    for arguments in (["--help"], ["quantize", "--help"], ["recipes"]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{arguments}: {done.output} {done.exception!r}"
    assert "torch" not in sys.modules
    version = ".".join(map(str, sys.version_info[:3]))
    sys.stdout.write(f"Python {version}: {len(files)} files, {len(recipes)} recipes, the help.\n")


if __name__ == "__main__":
    main()
