"""The bytes of a token that is no whole text: a part of a character."""

import functools
import re

from qtool.base import Tokenizer

FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def bytes_of(tokenizer: Tokenizer, token: int) -> bytes | None:
    """Return the bytes of a token of a byte-level vocabulary or a byte fallback; None: unknown."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    found = FALLBACK_BYTE.fullmatch(piece)
    if found:
        return bytes([int(found[1], 16)])
    table = byte_table()
    return bytes(table[c] for c in piece) if all(c in table for c in piece) else None


@functools.cache
def byte_table() -> dict[str, int]:
    """Return the byte of each character of byte-level vocabularies (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return {
        **{chr(byte): byte for byte in shown},
        **{chr(0x100 + number): byte for number, byte in enumerate(hidden)},
    }
