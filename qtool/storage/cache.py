"""Where qtool keeps what it can make again."""

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """Return where converted models, digests and scores are kept.

    $QTOOL_CACHE, else $XDG_CACHE_HOME/qtool, else ~/.cache/qtool; for a user without a home, as in
    some containers, a folder for temporary files.
    """
    root, xdg = os.environ.get("QTOOL_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if root:
        return Path(root)
    if xdg:
        return Path(xdg) / "qtool"
    try:
        return Path.home() / ".cache" / "qtool"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "qtool-cache"
