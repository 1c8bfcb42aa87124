"""Whether Ctrl-C was pressed, also where a library has made another error of it.

An import that is interrupted may end in an ImportError of the package that asked for it.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_PRESSED = threading.Event()


@contextmanager
def noted_interrupts() -> Iterator[None]:
    """Note SIGINT inside the block, and raise KeyboardInterrupt as Python does.

    Where something else is done on SIGINT, as in what a shell starts in the background, that stays.
    """
    _PRESSED.clear()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def note(_number: int, _frame: object) -> None:
        _PRESSED.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def was_interrupted() -> bool:
    """Return whether SIGINT has come since the last `noted_interrupts` began."""
    return _PRESSED.is_set()
