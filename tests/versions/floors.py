"""Print the lower bounds of pyproject.toml as pins, or check that they are what is installed.

    python tests/versions/floors.py > pins.txt
    python tests/versions/floors.py --check

torch is left out: its oldest wheels bring gigabytes of CUDA. It stays as constraints.txt pins it.
"""

import argparse
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
BOUND = re.compile(r"(?P<name>[\w.-]+)>=(?P<floor>[\d.]+)")
LEFT_OUT = ("torch",)


def floors() -> dict[str, str]:
    """Return the lowest allowed version by name of the dependency."""
    dependencies = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    bounds = [BOUND.match(text) for text in dependencies]
    found = {bound["name"]: bound["floor"] for bound in bounds if bound is not None}
    assert len(found) == len(dependencies), "a dependency has no lower bound"
    return {name: floor for name, floor in found.items() if name not in LEFT_OUT}


def numbers(text: str) -> tuple[int, ...]:
    """Return a version for comparison: 2.7 and 2.7.0 are the same."""
    parts = [int(part) for part in text.split(".")]
    return tuple(parts + [0] * (3 - len(parts)))


def main() -> None:
    """Print or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with what is installed")
    if not parser.parse_args().check:
        sys.stdout.write("".join(f"{name}=={floor}\n" for name, floor in floors().items()))
        return
    for name, floor in floors().items():
        assert numbers(version(name)) == numbers(floor), f"{name} is {version(name)}, not {floor}"


if __name__ == "__main__":
    main()
