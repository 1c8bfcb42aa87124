"""Where qtool keeps what it can make again."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return where converted models, digests and scores are kept.

    $QTOOL_CACHE, else $XDG_CACHE_HOME/qtool, else ~/.cache/qtool.
    """
    root = os.environ.get("QTOOL_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qtool"
