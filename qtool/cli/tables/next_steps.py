"""What a command says at its end: what to do with its result."""

import json
import shlex
from pathlib import Path

from qtool.cli import console


def print_next(*commands: tuple[object, ...]) -> None:
    """Print commands of qtool as they can be pasted; each by its words."""
    lines = [f"  {shlex.join(['qtool', *map(str, words)])}" for words in commands]
    console.out.print("\n".join(["Next:", *lines]), markup=False, soft_wrap=True)


def print_next_of_checkpoint(out_dir: Path, original: str | None) -> None:
    """Print how a checkpoint is measured, timed and talked with; of encoders nothing."""
    there = out_dir.expanduser()
    config = json.loads((there / "config.json").read_text(encoding="utf-8"))
    if not any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ()):
        return
    beside = () if original is None else ("--baseline", original)
    found: list[tuple[object, ...]] = [("eval", out_dir, *beside), ("bench", out_dir, *beside)]
    if (there / "chat_template.jinja").exists():
        found.append(("chat", out_dir))
    print_next(*found)
