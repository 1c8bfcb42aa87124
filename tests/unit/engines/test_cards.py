"""Which card each local worker computes on."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.engines import Task, Workers, local
from qtool.engines._worker import card_of_seat
from tests import engine_tasks as do


@given(st.integers(1, 8), st.integers(1, 20), st.integers(0, 7))
def test_workers_are_spread_evenly_from_the_own_card_on(cards, seats, own):
    own %= cards
    found = [card_of_seat(seat, cards, own) for seat in range(seats)]
    each = [found.count(card) for card in range(cards)]
    assert found[0] == own
    assert sum(each) == seats
    assert max(each) - min(each) <= 1


@pytest.mark.parametrize(("count", "expected"), [(None, [1, 0]), (3, [1, 0, 1])])
def test_each_process_is_told_its_card(monkeypatch, count, expected):
    told: list[int | None] = []

    start = local._Processes._start

    def starting(self: Any, seat: int) -> Any:
        made = self._context.Process

        def process(*, target: Any, args: tuple[Any, ...], daemon: bool) -> Any:
            told.append(args[2])
            return made(target=target, args=(*args[:2], None), daemon=daemon)  # no card is here

        with monkeypatch.context() as patch:
            patch.setattr(self._context, "Process", process)
            return start(self, seat)

    monkeypatch.setattr(local._Processes, "_start", starting)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with local.ENGINE.open(Workers(count=count, device="cuda")) as pool:
        assert list(pool.map(do.squared, [Task("task", 3)])) == [9]
    assert told == expected
