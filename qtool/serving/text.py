"""From tokens to text, piece by piece: no half characters, nothing of a text that ends it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qtool.base import Tokenizer
from qtool.serving.tokens import Finish, TokenEvent

UNDECODED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder makes of bytes that are no whole character."""
CONTEXT_TOKENS = 6
"""Tokens before the first new one that may change how it is written, as a space does."""
MOST_HELD = 32
"""Tokens that may be half a character: more are no character."""
WINDOW_TOKENS = 24
"""Tokens that are decoded together, at most, unless they are half a character."""


def decoder_of(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """Return what makes text of tokens, those that only the model knows left out."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    return decode


class Detokenizer:
    """Makes text of tokens as they come; all pieces together are what the tokens are at once."""

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        """Begin.

        Args:
            decode: Of `decoder_of`.
            context: Tokens of the text that is continued; none where a new one begins.
        """
        self._decode, self._ids = decode, list(context[-CONTEXT_TOKENS:])
        self._known = decode(self._ids) if self._ids else ""
        self._num_known = len(self._ids)

    def add(self, tokens: Sequence[int]) -> str:
        """Return the text that is certain now."""
        self._ids += tokens
        text = self._decode(self._ids)
        is_half = text.endswith(UNDECODED) and len(self._ids) - self._num_known <= MOST_HELD
        if len(text) <= len(self._known) or is_half:
            return ""
        return self._take(text)

    def flush(self) -> str:
        """Return what is left, be it half a character."""
        text = self._decode(self._ids)
        return self._take(text) if len(text) > len(self._known) else ""

    def _take(self, text: str) -> str:
        new, self._known = text[len(self._known) :], text
        before, self._num_known = self._num_known, len(self._ids)
        if len(self._ids) > WINDOW_TOKENS:
            self._ids = self._ids[before:]
            self._known, self._num_known = self._decode(self._ids), len(self._ids)
        return new


class StopTexts:
    """Ends a text before the first of some texts, and holds back what may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.found = tuple(filter(None, stops)), "", False

    def add(self, text: str) -> str:
        """Return what is certain not to belong to one; nothing after one was found."""
        if not self._stops or self.found:
            return "" if self.found else text
        held = self._held + text
        places = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return held[: min(places)]
        keep = max(map(len, self._stops)) - 1
        starts = range(max(0, len(held) - keep), len(held))
        cut = next((s for s in starts if self._may_begin(held[s:])), len(held))
        self._held = held[cut:]
        return held[:cut]

    def flush(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text of a sequence that is new."""

    text: str
    tokens: tuple[tuple[TokenEvent, int], ...] = ()
    """Tokens that have begun within the text so far, and where in it, if they are asked for."""
    finish: Finish | None = None


class SequenceText:
    """The text of one sequence, made of its events."""

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str], *, keep_tokens: bool
    ) -> None:
        self._detokenizer, self._stops = detokenizer, StopTexts(stops)
        self._has_stops, self._keeps = bool(stops), keep_tokens
        self._tokens: list[tuple[TokenEvent, int]] = []
        self._decoded = self._sent = 0
        self.num_tokens = 0
        """Tokens that the text has taken."""
        self.finish: Finish | None = None

    def add(self, events: Sequence[TokenEvent]) -> TextPiece:
        """Return the new text; a text that ends it cancels nothing: `finish` says it has ended."""
        by_one = self._has_stops or self._keeps
        groups = [[event] for event in events] if by_one else [list(events)]
        text = "".join(self._add(group) for group in groups if self.finish is None)
        self._sent += len(text)
        if self.finish is None or self._stops.found:
            ready = [pair for pair in self._tokens if pair[1] < self._sent]
        else:
            ready = self._tokens
        self._tokens = self._tokens[len(ready) :]
        return TextPiece(text, tuple(ready), self.finish)

    def _add(self, events: Sequence[TokenEvent]) -> str:
        last = events[-1].finish
        self.num_tokens += len(events)
        shown = events[:-1] if last == "stop" else events
        if self._keeps:
            self._tokens += [(event, self._decoded) for event in shown]
        new = self._detokenizer.add([event.token for event in shown])
        if last is not None:
            new += self._detokenizer.flush()
        self._decoded += len(new)
        text = self._stops.add(new)
        if self._stops.found:
            self.finish = "stop"
        elif last is not None:
            text, self.finish = text + self._stops.flush(), last
        return text
