"""Dry-run every shipped recipe on the demo model: one process, whose start outlasts its plans."""

import contextlib
import io
import json
import sys

from qtool import resources
from qtool.cli.app import main


def dry_run(recipe: str) -> None:
    """Call the command line; raises SystemExit if it fails, ValueError if it prints no JSON."""
    arguments = ("--recipe", recipe, "--dry-run", "--json", "-", "demo:smollm2", "unused")
    sys.argv = ["qtool", "quantize", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                raise
    json.loads(output.getvalue())


if __name__ == "__main__":
    for path in sorted(resources.recipes_dir().rglob("*.yaml")):
        dry_run(str(path))
        sys.stdout.write(f"{path.name} ok\n")
