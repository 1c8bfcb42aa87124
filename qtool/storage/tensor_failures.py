"""What safetensors says of a file system, as the errors that Python has for it."""

import contextlib
import os
import re
from collections.abc import Iterator
from errno import ENOSPC

from safetensors import SafetensorError


@contextlib.contextmanager
def numbered_failures() -> Iterator[None]:
    """Let what safetensors says of a file system be the error that it is, with its number.

    Raises:
        OSError: a file can't be written.
    """
    try:
        yield
    except SafetensorError as error:
        text = str(error)
        said = re.search(r"os error (\d+)", text)
        number = int(said[1]) if said else ENOSPC if "No space left" in text else None
        if number is None:
            raise OSError(text) from error
        raise OSError(number, os.strerror(number)) from error
