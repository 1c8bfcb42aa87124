"""Values that were found before, so that what was stopped goes on where it was."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from qtool.storage.plain_json import json_line
from qtool.storage.store import Store
from qtool.wording import reason


class Memo:
    """Values of JSON by key, in memory and, given a store, on disk as soon as there is one.

    A store that can't be written costs what would be kept, and stops nothing.
    """

    def __init__(
        self,
        store: Store | None = None,
        kind: str = "",
        owner: str = "",
        warn: Callable[[str], None] = lambda _message: None,
    ) -> None:
        self._store, self._place, self._warn = store, (kind, owner), warn
        kept = store.read(kind, owner) if store is not None else {}
        self._values = {key: json.loads(value) for key, value in kept.items()}

    def __contains__(self, key: bytes) -> bool:
        return key in self._values

    def __getitem__(self, key: bytes) -> Any:  # noqa: ANN401
        value = self._values[key]
        return tuple(value) if isinstance(value, list) else value

    def add(self, key: bytes, value: Any) -> None:  # noqa: ANN401
        """Keep a number, a text, or a tuple of numbers."""
        self._values[key] = value
        if self._store is not None:
            rows = {key: json_line(value)}
            if not added(self._store, *self._place, rows, self._warn):
                self._store = None


def added(
    store: Store, kind: str, owner: str, rows: Mapping[bytes, bytes], warn: Callable[[str], None]
) -> bool:
    """Add to a store and return True; warn, and go on, if that can't be done."""
    try:
        store.add(kind, owner, rows)
    except OSError as error:
        warn(
            f"Answers and scores can't be kept in {store.path}: {reason(error)}. The run goes on, "
            "and an interrupted one would begin anew. Set QTOOL_CACHE to a folder with room."
        )
        return False
    return True
