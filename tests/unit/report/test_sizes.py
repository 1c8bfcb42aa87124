"""The table and picture of several sizes."""

import pytest

from qtool.report.sizes import MeasuredSize, draw_sizes, with_front


def size(name: str, disk_bytes: int, kl: float, *, uniform: bool = False, chats: bool = True):
    return MeasuredSize(
        name=name,
        uniform=uniform,
        block_bits=disk_bytes / 100,
        strict_bits=disk_bytes / 90,
        disk_bytes=disk_bytes,
        kl_text=kl,
        kl_chats=kl / 2 if chats else None,
        perplexity=20 + kl,
    )


def test_the_front_is_what_nothing_smaller_beats():
    sizes = [size("c", 400, 0.1), size("a", 200, 0.5), size("d", 300, 0.6), size("b", 300, 0.2)]
    found = with_front(sizes)
    assert [(one.name, one.on_front) for one in found] == [
        ("a", True),
        ("b", True),
        ("d", False),
        ("c", True),
    ]


@pytest.mark.parametrize("chats", [True, False])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_drawn(tmp_path, suffix, chats):
    sizes = [size("a", 200, 0.5, chats=chats), size("u", 300, 0.6, uniform=True, chats=chats)]
    path = tmp_path / f"sizes.{suffix}"
    draw_sizes(path, with_front(sizes))
    assert path.stat().st_size > 10_000
