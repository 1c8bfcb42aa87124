"""From texts to samples: separators, chats, document starts, and never a pad token."""

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch

from qtool.data.calibration import draw_samples
from qtool.data.corpora import Corpus, load_corpus, open_dataset, tokenize
from qtool.data.documents import Document
from qtool.data.samples import cut, document_tokens, streams
from qtool.errors import DataError
from tests.families import save_tokenizer, text

PAD, BOS, EOS = 0, 1, 2
TEMPLATE = "{% for m in messages %}<s> {{ m.content }} {% endfor %}w95"
CHAT = [{"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w12"}]


@pytest.fixture
def tokenizer(tmp_path):
    """Return a tokenizer of the test's own, to set its special tokens."""
    from qtool.modeling.load import load_tokenizer

    directory = tmp_path / "tokenizer"
    save_tokenizer(directory)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return load_tokenizer(directory)


class AddsBos:
    """A tokenizer that starts every text with bos, as that of Llama does."""

    eos_token_id, bos_token_id, chat_template = EOS, BOS, None

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, words, **options):
        return {"input_ids": [BOS, *self.inner(words, **options)["input_ids"]]}

    def get_vocab(self):
        return self.inner.get_vocab()


def collection(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    lines = (json.dumps(row if isinstance(row, dict) else {"text": row}) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    return open_dataset(str(path))


def lists(calibration):
    return [sample.tolist() for sample in calibration.samples]


def test_running_text_is_one_stream_cut_from_its_start(tokenizer, text_file):
    corpus = load_corpus(str(text_file))
    lengths = [30, 7, 100]
    for at_starts in (False, True):  # matching lengths changes nothing: the text has one start
        drawn = draw_samples(tokenizer, corpus, lengths, at_starts=at_starts)
        stream = tokenize(tokenizer, corpus.text)[: sum(lengths)]
        assert lists(drawn) == [part.tolist() for part in stream.split(lengths)]
        assert not drawn.provenance["starts at documents"]


def test_samples_of_a_bundled_text_are_these(tokenizer):
    """The measuring protocol depends on these cuts."""
    drawn = draw_samples(tokenizer, load_corpus("wikitext2-valid"), [2048] * 64)
    assert drawn.digest() == "f1b7c66bfb1cf8ea"


def test_documents_are_one_stream_separated_by_eos(tokenizer, tmp_path):
    texts = collection(tmp_path, "w10 w11 w12", "w20", "w30 w31 w32 w33")
    drawn = draw_samples(tokenizer, texts, [4, 4, 2])
    assert lists(drawn) == [[10, 11, 12, EOS], [20, EOS, 30, 31], [32, 33]]


def test_matched_samples_start_at_documents_and_are_filled_up(tokenizer, tmp_path):
    texts = collection(tmp_path, "w10 w11 w12", "w20", "w30 w31 w32 w33", "w40", "w50 w51")
    drawn = draw_samples(tokenizer, texts, [2, 5, 4], at_starts=True)
    assert lists(drawn) == [[10, 11], [20, EOS, 30, 31, 32], [40, EOS, 50, 51]]
    assert drawn.provenance["starts at documents"]


def test_long_document_is_cut_not_dropped(tokenizer, tmp_path):
    long = text(500)
    drawn = draw_samples(tokenizer, collection(tmp_path, long, long), [64, 64], at_starts=True)
    assert lists(drawn)[0] == lists(drawn)[1] == tokenize(tokenizer, long)[:64].tolist()


def test_bos_starts_every_matched_sample_if_the_tokenizer_adds_it(tokenizer, tmp_path):
    texts = collection(tmp_path, "w10 w11", "w20 w21", "w30 w31")
    drawn = draw_samples(AddsBos(tokenizer), texts, [3, 6], at_starts=True)
    assert lists(drawn) == [[BOS, 10, 11], [BOS, 20, 21, EOS, BOS, 30]]


@pytest.mark.parametrize(
    ("eos", "bos", "expected"),
    [
        ("</s>", "<s>", [3, 4, EOS]),
        ("</s>", None, [3, 4, EOS]),
        (None, "<s>", [BOS, 3, 4]),
        (None, None, [3, 4]),
    ],
)
def test_separator_is_eos_else_bos_else_nothing(tokenizer, eos, bos, expected):
    tokenizer.eos_token, tokenizer.bos_token = eos, bos
    assert document_tokens(tokenizer, Document("w3 w4", "here")).tolist() == expected


def test_separator_is_not_doubled(tokenizer):
    assert document_tokens(tokenizer, Document("w3 </s>", "here")).tolist() == [3, EOS]
    tokenizer.eos_token = None
    assert document_tokens(tokenizer, Document("<s> w3", "here")).tolist() == [BOS, 3]


def test_empty_text_gives_no_tokens(tokenizer):
    for words in ("", " \n"):
        assert len(document_tokens(AddsBos(tokenizer), Document(words, "here"))) == 0


def test_chat_is_what_the_template_makes_of_it(tokenizer, tmp_path):
    tokenizer.chat_template = TEMPLATE
    drawn = draw_samples(tokenizer, collection(tmp_path, {"messages": CHAT}, "w20"), [6, 2])
    assert lists(drawn) == [[BOS, 10, 11, BOS, 12, 95], [20, EOS]]
    assert drawn.provenance["chat template"] is True


def test_chat_without_template_says_what_to_do(tokenizer, tmp_path):
    texts = collection(tmp_path, "w3 w4", {"messages": CHAT})
    with pytest.raises(DataError, match=r"rows\.jsonl line 2 is a chat, .*no chat template\. Give"):
        draw_samples(tokenizer, texts, [2, 2])


def test_template_that_refuses_a_chat_is_named_with_the_line(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(
        DataError, match=r"line 1: the model's chat template refuses.*must alternate"
    ):
        draw_samples(tokenizer, collection(tmp_path, {"messages": CHAT}), [2, 2])


CALL: list[dict[str, Any]] = [
    {"role": "user", "content": "w3"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w4"}}]},
    {"role": "assistant", "tool_calls": [{"function": {"name": "w4"}}]},
]
KNOWS_CALLS = (
    "{% for m in messages %}{% if m.content is defined and m.content is not none %}{{ m.content }}"
    "{% else %} {{ m.tool_calls[0].function.name }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "tokens"),
    [
        (KNOWS_CALLS, [3, 4, 4]),
        ("{% for m in messages %}{{ m.content + ' w5 ' }}{% endfor %}", [3, 5, 5, 5]),  # fails
        ("{% for m in messages %}{{ m.content ~ ' w5 ' }}{% endfor %}", [3, 5, 5, 5]),  # "None w5"
    ],
)
def test_turn_without_content_says_nothing_that_nobody_said(tokenizer, template, tokens):
    tokenizer.chat_template = template
    assert document_tokens(tokenizer, Document(CALL, "here")).tolist() == tokens


@pytest.mark.parametrize("rows", [[], ["", " \n", "\t"]])
def test_collection_without_text_says_so(tokenizer, tmp_path, rows):
    with pytest.raises(DataError, match=rf"holds no text: each of its {len(rows)} documents"):
        draw_samples(AddsBos(tokenizer), collection(tmp_path, *rows), [2, 2])


@pytest.mark.parametrize("at_starts", [False, True])
def test_no_sample_is_padded_or_of_another_length(tokenizer, tmp_path, at_starts):
    texts = collection(tmp_path, *(text(5 + 3 * seed, seed) for seed in range(20)))
    drawn = draw_samples(tokenizer, texts, [16, 40, 8] * 20, at_starts=at_starts)
    assert 2 <= len(drawn.samples) < 60
    assert [len(sample) for sample in drawn.samples] == ([16, 40, 8] * 20)[: len(drawn.samples)]
    assert not any((sample == PAD).any() for sample in drawn.samples)


def test_only_what_is_needed_is_read(tokenizer, tmp_path):
    texts = collection(tmp_path, *["w3 w4 w5"] * 9, {"nothing": "that qtool reads"})
    drawn = draw_samples(tokenizer, texts, [4, 4])
    assert drawn.provenance["documents"] == 2


def test_same_documents_give_the_same_digest(tokenizer, tmp_path):
    rows = [text(30, seed) for seed in range(4)]
    first, again, other = (
        draw_samples(tokenizer, collection(tmp_path, *rows), [20, 20], at_starts=at_starts)
        for at_starts in (False, False, True)
    )
    assert first.digest() == again.digest() != other.digest()


def test_provenance_says_where_the_tokens_come_from(tokenizer, tmp_path, text_file):
    running = draw_samples(tokenizer, load_corpus(str(text_file)), [10] * 3).provenance
    documents = draw_samples(tokenizer, collection(tmp_path, text(40)), [10] * 9).provenance
    assert running["dataset"] == "words.txt"
    assert documents["dataset"] == "rows.jsonl"
    for about in (running, documents):
        assert len(about["sha256"]) == 64
        assert about["chat template"] is False
        assert about["documents"] == 1
    assert (documents["samples"], documents["samples wanted"]) == (4, 9)
    assert (documents["tokens"], documents["tokens wanted"]) == (40, 90)


def test_fewer_than_two_samples_are_an_error_with_the_number_of_tokens(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"rows\.jsonl has 6 tokens; .* first of them 4 long"):
        draw_samples(tokenizer, collection(tmp_path, "w3 w4", "w5 w6"), [4, 4])


def test_cut_uses_every_token_of_a_stream_once():
    pieces = [torch.arange(start, stop) for start, stop in pairwise([0, 3, 3, 10, 11, 30])]
    samples = list(cut(pieces, [4, 8, 1, 12, 9], at_starts=False))
    assert torch.cat(samples).tolist() == list(range(25))


def test_running_text_counts_as_one_document(tokenizer):
    read: Counter[str] = Counter()
    (stream,) = streams(tokenizer, Corpus("mine", "w3 w4"), read)
    assert (len(stream), read["documents"], read["chats"], read["tokens"]) == (2, 1, 0, 2)
