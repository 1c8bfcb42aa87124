"""Safetensors files with something wrong in the header or around it."""

import copy
import json
import struct
from typing import Any

from hypothesis import strategies as st

from tests.robustness.values import HOSTILE, json_bytes

DTYPES = ("F16", "BF16", "F32", "F64", "I8", "U8", "I16", "I32", "I64", "BOOL", "F8_E4M3", "X", "")
LENGTHS = (0, 1, 7, 2**16, 10**8, 2**31, 2**63 - 1, 2**64 - 1)
NAMES = (
    *("x", "", "..", "../x", "/x", "日本" * 100, "\x00", "\ud83d", "a" * 5000, "__metadata__"),
    *("model.layers.x.foo", "model.layers.999999999999.a", "model.layers.2.mlp.up_proj.weight"),
    *("model.layers.-1.x", "model.layers..x", "model.layers", "lm_head.bias", "model.layers.0.x"),
    *("model.layers.٣.x", "model.layers.1e3.x", "model.layers.00.x", "lm_head.weight.scales"),
)


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the bytes of the tensors."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, data: bytes, length: int | None = None) -> bytes:
    """Return a file; `length` is what it says of its header, None: the truth."""
    text = json_bytes(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@st.composite
def damaged_safetensors(draw: st.DrawFn, content: bytes) -> tuple[str, bytes, bool]:
    """Draw what was done, the file, and whether what a reader accepts must be what was there."""
    kind = draw(st.sampled_from(["around", "entry", "entry", "entry", "name", "name", "add"]))
    header, data = split(content)
    if kind == "around":
        what, changed = _around(draw, content, header, data)
        return what, changed, True
    names = [name for name in header if name != "__metadata__"]
    name = draw(st.sampled_from(sorted(names)))
    if kind == "entry":
        what = _change_entry(draw, header, name)
        return f"{name}: {what}", joined(header, data), not what.startswith("dtype")
    other = draw(st.sampled_from([*NAMES, f"_orig_mod.{name}", name.upper(), f"{name}.", *names]))
    if kind == "name":
        entry = header.pop(name)
        header[other] = entry  # of another tensor: that one is lost
        return f"{name} renamed {other!r:.60}", joined(header, data), True
    shape = draw(st.sampled_from([[0], [], [2, 0, 3], [4], [2, 2]]))
    size = 4 * (0 if 0 in shape else 1 if not shape else 4)
    if other not in names:
        offsets = [len(data), len(data) + size]
        header[other] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        data += bytes(size)
    return f"added {other!r:.60} {shape}", joined(header, data), True


def _around(
    draw: st.DrawFn, content: bytes, header: dict[str, Any], data: bytes
) -> tuple[str, bytes]:
    """Change the length of the header, the end of the file, or what isn't a tensor."""
    place = draw(st.sampled_from([0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1]))
    length = draw(st.sampled_from(LENGTHS))
    hostile = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    first = next(name for name in header if name != "__metadata__")
    text = json.dumps(header)
    twice = text.replace("{", "{" + json.dumps(first) + ": " + json.dumps(header[first]) + ", ", 1)
    return draw(
        st.sampled_from(
            [
                (f"cut at {place}", content[:place]),
                ("one byte more", content + b"\x00"),
                ("a page more", content + bytes(4096)),
                (f"header of {length} bytes, it says", joined(header, data, length)),
                (f"metadata {hostile!r:.40}", joined({**header, "__metadata__": hostile}, data)),
                (f"header {hostile!r:.40}", joined(hostile, data)),
                (f"metadata of {hostile!r:.40}", joined(_with_metadata(header, hostile), data)),
                (f"{first} twice", struct.pack("<Q", len(twice)) + twice.encode() + data),
                ("empty", b""),
                ("zeros", bytes(len(content))),
                ("no tensors", joined({}, b"")),
                ("a pointer of git lfs", b"version https://git-lfs.github.com/spec/v1\noid x\n"),
                ("a pickle", b"\x80\x02}q\x00." + content[6:]),
            ]
        )
    )


def _with_metadata(header: dict[str, Any], value: Any) -> dict[str, Any]:
    return {**header, "__metadata__": {"format": value}}


def _change_entry(draw: st.DrawFn, header: dict[str, Any], name: str) -> str:
    entry = header[name]
    begin, end = entry["data_offsets"]
    key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "hostile", "drop", "lost"]))
    if key == "dtype":
        entry["dtype"] = draw(st.sampled_from(DTYPES))
    elif key == "shape":
        shape = entry["shape"]
        shapes = [shape[::-1], [*shape, 1], [1, *shape], shape[:-1], [-1, *shape[1:]], [0]]
        shapes += [[2**32, 2**32], [2**63], [sum(shape)], [], [[1]], ["1"], [1.0 * shape[0]]]
        entry["shape"] = draw(st.sampled_from(shapes))
    elif key == "data_offsets":
        offsets = [[end, begin], [begin, end - 1], [begin + 2, end + 2], [0, end], [begin]]
        offsets += [[begin, end, end], [-2, end], [begin, 2**63], [2**64, 2**65], [begin, begin]]
        entry["data_offsets"] = draw(st.sampled_from(offsets))
    elif key == "lost":
        del header[name]
        return "is lost"
    else:
        which = draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))
        if key == "drop" and which != "x":
            del entry[which]
            return f"no {which}"
        entry[which] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        return f"{'' if which != 'dtype' else 'dtype '}{which}={entry[which]!r:.60}"
    return f"{key}={entry[key]!r:.60}"
