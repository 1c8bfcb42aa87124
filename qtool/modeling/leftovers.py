"""What a trainer left beside merged weights, and transformers would take for part of a model."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"


@contextlib.contextmanager
def without_leftovers(directory: Path) -> Iterator[Path]:
    """Yield a model's directory, or one of links to its files without an adapter's configuration.

    With PEFT installed, transformers loads an adapter wherever that file lies, and fails without
    its weights; what is in the directory is the merged model, for `read_config` refuses both.
    """
    if not (directory / ADAPTER_CONFIG).exists():
        yield directory
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in directory.resolve().iterdir():
            if path.name != ADAPTER_CONFIG:
                (Path(folder) / path.name).symlink_to(path)
        yield Path(folder)
