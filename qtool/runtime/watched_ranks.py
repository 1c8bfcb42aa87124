"""Notices that a process among several has ended, though this one waits for it in a collective."""

import os
import select
import sys
import threading
from collections.abc import Sequence

FAILED = 1
"""Exit status of a process whose peers have ended."""


class RankWatch:
    """Ends this process when another one ends before `stop`; a thread waits for the kernel's word.

    No heartbeats: a process that is busy for long isn't taken for dead.
    """

    def __init__(self, rank: int, processes: Sequence[int]) -> None:
        """Begin.

        Args:
            rank: Of this process.
            processes: Ids of all of them on this host, by rank.
        """
        self._rank, self._count = rank, len(processes)
        self._woken, self._wakes = os.pipe()
        self._opened: dict[int, int] = {}
        for number, process in enumerate(processes):
            if number != rank:
                try:
                    self._opened[os.pidfd_open(process)] = number
                except ProcessLookupError:  # since it told its id
                    self._end(number)
        self._thread = threading.Thread(target=self._wait, name="rank watch", daemon=True)
        self._thread.start()

    @staticmethod
    def own_process() -> int:
        """Return what others need to watch this process."""
        return os.getpid()

    def stop(self) -> None:
        """Let the others end: they have done what they were to do."""
        os.write(self._wakes, b".")
        self._thread.join()
        for descriptor in (self._woken, self._wakes, *self._opened):
            os.close(descriptor)

    def _wait(self) -> None:
        poll = select.poll()
        for descriptor in (self._woken, *self._opened):
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll()}
        if self._woken not in ready:
            self._end(min(self._opened[descriptor] for descriptor in ready))

    def _end(self, number: int) -> None:
        """Say it and leave at once: the main thread may wait for a card that never answers."""
        sys.stderr.write(
            f"Error: rank {number} of {self._count} has ended, so rank {self._rank} can't go on "
            "and ends too. If it was killed, look whether memory ran out; else its own message "
            "says why.\n"
        )
        sys.stderr.flush()
        os._exit(FAILED)
