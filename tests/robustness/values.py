"""Hostile values, and good values with something wrong in one place."""

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

DEEP, HUGE = "@deep@", "@huge@"
"""Stand-ins for what Python's json can't write: see `json_bytes`."""
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 1.5, -0.0, 1e-300, 1e308),
    *(math.nan, math.inf, -math.inf, 2**31, 2**63, -(2**63) - 1, 10**30, HUGE, DEEP),
    *("", "2", "false", "null", "text", " ", "\x00", "\n", "\ud83d", "日本語", "a" * 5000),
    *("..", "../x", "/etc/passwd", "\x1b[31m", "[bold]x[/bold]", "%s", "{0}", "\u202e"),
    *([], [None], [1, 2], ["x"], {}, {"x": None}, {"": 1}, [[]], [{}]),
)
Path_ = tuple[str | int, ...]


def paths(tree: Any, start: Path_ = ()) -> Iterator[Path_]:
    """Yield where the values of a tree are, the root excepted."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in children:
        yield (*start, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*start, key))


def related(value: Any) -> list[Any]:
    """Return what somebody could write in place of a value."""
    near: list[Any] = [str(value), [value], {"value": value}]
    if isinstance(value, int | float):
        near += [-value, value + 1, value - 1, value * 2, value / 2, float(value)]
    if isinstance(value, str):
        near += [value.upper(), value + " ", value[:-1], f"{value}\x00", value * 2]
    if isinstance(value, list):
        near += [value[:-1], value * 2, value[::-1], dict(enumerate(map(str, value)))]
    if isinstance(value, dict):
        near += [list(value), dict(list(value.items())[:-1])]
    return near


@st.composite
def changed_trees(draw: st.DrawFn, tree: Any) -> tuple[str, Any]:
    """Draw a tree with one to three values replaced, dropped, renamed or added."""
    value, done = copy.deepcopy(tree), []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        known = list(paths(value))
        if not known:
            break
        path = draw(st.sampled_from(known))
        done.append(_change(draw, value, path))
    return "; ".join(done), value


def _change(draw: st.DrawFn, tree: Any, path: Path_) -> str:
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    key, where = path[-1], ".".join(map(str, path))
    action = draw(st.sampled_from(["replace", "replace", "relate", "relate", "drop", "add"]))
    if action == "drop":
        del parent[key]
        return f"no {where}"
    if action == "add" and isinstance(parent, dict):
        name = draw(
            st.sampled_from(["x", "", "日本語", "\x00", "a.b", f"{key} ", str(key).upper()])
        )
        parent[name] = copy.deepcopy(parent[key])
        return f"{where} again as {name!r}"
    choices = related(parent[key]) if action == "relate" else list(HOSTILE)
    parent[key] = copy.deepcopy(draw(st.sampled_from(choices)))
    return f"{where}={parent[key]!r:.60}"


def json_bytes(tree: Any) -> bytes:
    """Return a tree as JSON, with what Python's json doesn't write."""
    text = json.dumps(tree)
    deep = "[" * 100_000 + "]" * 100_000
    return text.replace(f'"{DEEP}"', deep).replace(f'"{HUGE}"', "9" * 5000).encode()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> tuple[str, bytes]:
    """Draw what disks, editors and networks make of the bytes of a text."""
    place = draw(st.integers(0, len(content)))
    junk = draw(st.sampled_from([b"\x00", b"\xff\xfe", b"\xed\xa0\xbd", b"}", b"\r", b"\t", b'"']))
    return draw(
        st.sampled_from(
            [
                (f"cut at {place}", content[:place]),
                (f"{junk!r} at {place}", content[:place] + junk + content[place:]),
                (f"{junk!r} over {place}", content[:place] + junk + content[place + len(junk) :]),
                (f"lost {place} to +9", content[:place] + content[place + 9 :]),
                ("byte order mark", b"\xef\xbb\xbf" + content),
                ("two byte order marks", 2 * b"\xef\xbb\xbf" + content),
                ("UTF-16", content.decode("utf-8", "replace").encode("utf-16")),
                ("Windows lines", content.replace(b"\n", b"\r\n")),
                ("zeros", bytes(len(content))),
                ("twice", content + content),
                ("a tail", content + b"\n\n\x1a"),
            ]
        )
    )


def one_of_two(first: SearchStrategy[Any], second: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """Draw from the first three times as often."""
    return st.sampled_from([first, first, first, second]).flatmap(lambda chosen: chosen)
