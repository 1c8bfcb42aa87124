"""Text in pieces is the text at once, and no piece has half a character."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qtool.serving.text import Detokenizer, SequenceText, StopTexts, decoder_of
from qtool.serving.token_bytes import byte_table, bytes_of
from qtool.serving.tokens import TokenEvent


def byte_level(shift: int = 0) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are single bytes, from one of them on, and an end."""
    numbers = {char: (byte - shift) % 256 for char, byte in byte_table().items()}
    tokenizer = Tokenizer(models.BPE({**numbers, "</s>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def sentences() -> PreTrainedTokenizerFast:
    """Return one that writes spaces as SentencePiece does, and unknown characters in bytes."""
    pieces = ["▁Paris", "▁is", "▁", "a", "b", "."]
    names = [*pieces, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, "."))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES, SENTENCES = byte_level(), sentences()
CUTS = st.lists(st.integers(1, 5), min_size=60, max_size=60)


def in_groups(tokens, sizes):
    rest = list(tokens)
    for size in sizes:
        if not rest:
            return
        yield rest[:size]
        del rest[:size]
    yield rest


@given(text=st.text(max_size=40), sizes=CUTS)
def test_pieces_of_bytes_are_whole_characters(text, sizes):
    detokenizer = Detokenizer(decoder_of(BYTES))
    pieces = [detokenizer.add(group) for group in in_groups(text.encode(), sizes)]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


@given(tokens=st.lists(st.integers(0, 255), max_size=40), sizes=CUTS)
def test_any_bytes_come_out_in_the_end(tokens, sizes):
    detokenizer = Detokenizer(decoder_of(BYTES))
    text = "".join(detokenizer.add(group) for group in in_groups(tokens, sizes))
    text += detokenizer.flush()
    assert (
        text.encode("utf-8").replace("\ufffd".encode(), b"")
        == bytes(tokens).decode("utf-8", errors="ignore").replace("\ufffd", "").encode()
    )


@given(tokens=st.lists(st.integers(0, 5), min_size=1, max_size=60), sizes=CUTS)
def test_spaces_are_those_of_the_whole(tokens, sizes):
    whole = SENTENCES.decode(tokens, clean_up_tokenization_spaces=False)
    detokenizer = Detokenizer(decoder_of(SENTENCES))
    pieces = [detokenizer.add(group) for group in in_groups(tokens, sizes)]
    assert "".join(pieces) + detokenizer.flush() == whole
    going_on = Detokenizer(decoder_of(SENTENCES), context=[0, 1])
    assert "Paris is" + going_on.add(tokens) + going_on.flush() == SENTENCES.decode([0, 1, *tokens])


@given(text=st.text("abc", max_size=30), stops=st.lists(st.text("abc", min_size=1, max_size=4)))
def test_nothing_of_a_stop_gets_out(text, stops):
    for step in (1, 2, 7):
        finder, out = StopTexts(stops), ""
        for begin in range(0, len(text), step):
            out += finder.add(text[begin : begin + step])
        places = [text.find(stop) for stop in stops if stop in text]
        if finder.found and step == 1:
            # the first that is complete ends it, character by character
            ends = min(text.find(stop) + len(stop) for stop in stops if stop in text)
            assert text.startswith(out)
            assert len(out) <= ends
        assert finder.found == bool(places)
        if not places:
            assert out + finder.flush() == text
        else:
            assert text.startswith(out)
            assert not any(stop in out for stop in stops)


def test_what_is_no_character_is_not_waited_for():
    detokenizer, longest = Detokenizer(decoder_of(BYTES)), 0
    text = "".join(detokenizer.add([0xA9]) for _ in range(500))
    for _ in range(500):
        text += detokenizer.add([0xA9])
        longest = max(longest, len(detokenizer._ids))
    assert set(text) == {"\ufffd"}
    assert longest < 100


def events(text, finish="length"):
    data = text.encode()
    ends = [None] * (len(data) - 1) + [finish]
    return [TokenEvent(0, byte, finish=end) for byte, end in zip(data, ends, strict=True)]


def test_a_text_that_ends_it_counts_its_tokens_and_no_more():
    for size in (1, 3, 50):
        text = SequenceText(Detokenizer(decoder_of(BYTES)), ["STOP"], keep_tokens=True)
        pieces = [text.add(group) for group in in_groups(events("héllo STOPPED"), [size] * 60)]
        assert "".join(piece.text for piece in pieces) == "héllo "
        assert text.finish == "stop"
        assert text.num_tokens == len("héllo STOP".encode())
        kept = [event.token for piece in pieces for event, _ in piece.tokens]
        assert bytes(kept).decode() == "héllo "


def test_the_token_that_ends_it_is_counted_and_not_shown():
    text = SequenceText(Detokenizer(decoder_of(BYTES)), [], keep_tokens=True)
    piece = text.add([*events("ab", None), TokenEvent(0, 256, finish="stop")])
    assert (piece.text, piece.finish, text.num_tokens) == ("ab", "stop", 3)
    assert [start for _, start in piece.tokens] == [0, 1]


def test_what_was_held_back_comes_with_the_end():
    text = SequenceText(Detokenizer(decoder_of(BYTES)), ["STOP"], keep_tokens=False)
    assert text.add(events("go ST", None)).text == "go "
    assert text.add(events("O")).text == "STO"


@pytest.mark.parametrize(("tokenizer", "name"), [(BYTES, "Ã"), (SENTENCES, "<0xC3>")])
def test_bytes_of_half_a_character(tokenizer, name):
    assert bytes_of(tokenizer, tokenizer.convert_tokens_to_ids(name)) == b"\xc3"
