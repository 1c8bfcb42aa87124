"""Mixtures: shares, separators, document starts, held-out samples of every source."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.data.calibration_files import load_calibration, save_calibration
from qtool.data.corpora import Corpus, open_dataset
from qtool.data.documents import Collection, Document
from qtool.data.mixture import Source, draw_mixture, in_parts, interleave
from qtool.errors import DataError
from tests.families import save_tokenizer, text

BOS, EOS, OTHER_END = 1, 2, 95
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "<s> {{ m.content }} {% endfor %}w94"
)
CHAT = [{"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w12"}]
SYSTEM = {"role": "system", "content": "w13"}
WORDS = "w3 w4 w5 w6"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from qtool.modeling.load import load_tokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return load_tokenizer(directory)


@pytest.fixture
def chatty(tokenizer, monkeypatch):
    """Return the tokenizer with a template that knows no system turn."""
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


class EndsTwice:
    """A tokenizer whose vocabulary has another token that ends a document, as SmolLM2's."""

    def __init__(self, inner):
        self.inner, self.added_tokens_decoder = inner, {OTHER_END: EndOfText()}

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, words, **options):
        return self.inner(words, **options)


class EndOfText:
    special = True

    def __str__(self):
        return "<|endoftext|>"


class NoEnds:
    """A tokenizer with bos alone."""

    eos_token_id, bos_token_id, chat_template = None, BOS, None

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, words, **options):
        return self.inner(words, **options)

    def get_vocab(self):
        return self.inner.get_vocab()


def documents(*contents, name="mine", share=1.0, rendering=None):
    found = (Document(content, f"{name} {n}") for n, content in enumerate(contents, 1))
    return Source(Collection(name, {"sha256": "0"}, iter(found)), share, rendering)


def texts(count, name, share, first=0):
    """Return a source of documents that begin with a word of their own."""
    contents = (f"w{20 + n + first} " + text(12, n) for n in range(count))
    return documents(*contents, name=name, share=share)


def draw(sources, tokenizer, lengths, *, seed=0, holdout=0.1):
    return draw_mixture(sources, tokenizer, lengths, seed=seed, holdout=holdout)


def lists(calibration):
    return [sample.tolist() for sample in calibration.samples]


shares = st.lists(st.integers(1, 40), min_size=1, max_size=9).map(
    lambda parts: [part / sum(parts) for part in parts]
)


@given(shares, st.integers(0, 300))
def test_any_beginning_has_the_shares_within_one_sample(wanted, count):
    order = interleave(wanted, count)
    assert len(order) == count
    had = [0] * len(wanted)
    for place, owner in enumerate(order, 1):
        had[owner] += 1
        assert all(abs(h - place * s) < 1 + 1e-6 for h, s in zip(had, wanted, strict=True))


@given(shares, st.integers(0, 10**6), st.floats(0.05, 0.5))
def test_every_source_is_held_out_and_its_documents_are_not_solved_with(
    tokenizer, wanted, seed, holdout
):
    count = 2 + int(2 / min(wanted))
    sources = [texts(6, f"source {n}", share, 8 * n) for n, share in enumerate(wanted)]
    drawn = draw(sources, tokenizer, [8] * count, seed=seed, holdout=holdout)
    solved, held_out = drawn.split(holdout)
    assert set(held_out.sources) == set(solved.sources) == set(range(len(wanted)))
    assert len(solved.samples) + len(held_out.samples) == count
    assert not starts(solved) & starts(held_out)


def starts(calibration):
    """Return the words that documents begin with, of samples shorter than a document."""
    return {sample[1 if sample[0] == EOS else 0] for sample in lists(calibration)}


@given(st.integers(0, 2**32 - 1))
def test_seed_decides_all_of_it(tokenizer, seed):
    def drawn(seed):
        return draw([texts(9, "a", 0.5), texts(9, "b", 0.5)], tokenizer, [16, 5] * 6, seed=seed)

    one, two = drawn(seed), drawn(seed)
    assert (lists(one), one.provenance, one.sources) == (lists(two), two.provenance, two.sources)
    assert one.digest() != drawn(seed + 1).digest()


def test_samples_start_at_documents_and_every_second_after_a_separator(tokenizer):
    drawn = draw([documents(*[WORDS] * 30)], tokenizer, [8] * 12)
    plain, packed = [3, 4, 5, 6, EOS, 3, 4, 5], [EOS, 3, 4, 5, 6, EOS, 3, 4]
    assert lists(drawn.split(0.1)[0]) == [plain, packed] * 5 + [plain]


def test_separators_of_a_vocabulary_take_turns(tokenizer):
    (sample, *_) = lists(draw([documents(*["w3"] * 30)], EndsTwice(tokenizer), [8, 8]))
    assert sample == [3, EOS, 3, OTHER_END, 3, EOS, 3, OTHER_END]


def test_without_eos_documents_begin_with_bos(tokenizer):
    drawn = draw([documents(*["w3 w4"] * 30)], NoEnds(tokenizer), [6, 6, 6])
    assert lists(drawn) == [[BOS, 3, 4, BOS, 3, 4]] * 3


def test_chats_are_rendered_in_the_template_and_joined(chatty):
    drawn = draw([documents(CHAT, CHAT, CHAT)], chatty, [9, 6])
    assert lists(drawn) == [[BOS, 10, 11, BOS, 12, 94, BOS, 10, 11], [BOS, 10, 11, BOS, 12, 94]]
    assert drawn.provenance["chat template"] is True


def test_system_turn_that_a_template_refuses_is_said_by_the_user(chatty):
    drawn = draw([documents([SYSTEM, *CHAT], rendering="chat")], chatty, [7, 7])
    assert lists(drawn)[0] == [BOS, 13, 10, 11, BOS, 12, 94]


@pytest.mark.parametrize("rendering", [None, "text"])
def test_chats_become_text_where_there_is_no_template_or_it_is_asked_for(
    tokenizer, monkeypatch, rendering
):
    if rendering == "text":
        monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    drawn = draw([documents(CHAT, rendering=rendering)], tokenizer, [8, 8])
    (sample, *_) = lists(drawn)
    assert [token for token in sample if token not in (0, BOS)] == [10, 11, 12, EOS]  # 0: unknown
    assert drawn.provenance["chat template"] is False


def test_chat_without_a_template_and_text_as_chat_are_refused(chatty):
    with pytest.raises(DataError, match=r"mine 1 is a text, .* \(as: chat\)"):
        draw([documents("w3", rendering="chat")], chatty, [4, 4])
    chatty.chat_template = None
    with pytest.raises(DataError, match=r"mine 1 is a chat, .* no chat template"):
        draw([documents(CHAT, rendering="chat")], chatty, [4, 4])


def test_source_without_text_is_refused_by_its_name(tokenizer):
    with pytest.raises(DataError, match="empty holds no text"):
        draw([texts(3, "a", 0.5), documents(" ", "", name="empty", share=0.5)], tokenizer, [4] * 4)


def test_short_source_begins_again_in_another_order(tokenizer):
    drawn = draw([texts(12, "a", 1.0)], tokenizer, [13] * 200)
    assert drawn.provenance["sources"][0]["rounds"] > 1
    assert drawn.provenance["sources"][0]["documents"] == 12
    rounds = [tuple(lists(drawn)[n : n + 11]) for n in range(0, 88, 11)]
    assert len({str(one) for one in rounds}) == len(rounds)


def test_provenance_has_each_source(tokenizer, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text(20, n)}) + "\n" for n in range(9)))
    sources = [
        Source(open_dataset(str(rows)), 0.75),
        Source(Corpus("words", text(99)), 0.25, "text"),
    ]
    about = draw(sources, tokenizer, [8] * 16).provenance
    assert about["dataset"] == "a mixture of rows.jsonl, words"
    first, second = about["sources"]
    assert (first["dataset"], first["share"], first["samples"], first["tokens"]) == (
        *("rows.jsonl", 0.75),
        *(12, 96),
    )
    assert len(first["sha256"]) == 64
    assert (second["as"], second["samples"]) == ("text", 4)
    assert (about["samples"], about["tokens"]) == (16, 128)


def test_long_text_is_cut_at_paragraphs_and_all_of_it_is_used():
    paragraphs = [f"{n} " * 20 for n in range(40)]
    whole = "\n \n".join(paragraphs)
    parts = list(in_parts(whole, 200))
    assert max(map(len, parts)) <= 200
    assert " ".join(" ".join(parts).split()) == " ".join(whole.split())
    assert list(in_parts("one line", 3)) == ["one line"]
    assert list(in_parts(" \n\n ", 3)) == []


def test_articles_of_wikitext_are_documents_of_their_own(tokenizer):
    running = " = w20 = \n\n w3 w4 \n = w21 = \n\n w5 \n"
    drawn = draw([Source(Corpus("wiki", running), 1.0)], tokenizer, [4, 4, 4, 4])
    heads = {tuple(s for s in sample if s >= 20) for sample in lists(drawn)}
    assert heads == {(20,), (21,)}


def test_sources_of_the_samples_are_kept_in_a_directory(tokenizer, tmp_path):
    drawn = draw([texts(9, "a", 0.5), texts(9, "b", 0.5)], tokenizer, [8] * 8)
    save_calibration(drawn, tmp_path)
    loaded = load_calibration(tmp_path, tokenizer)
    assert loaded.sources == drawn.sources
    assert lists(loaded.split(0.3)[1]) == lists(drawn.split(0.3)[1])
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "samples.safetensors")
    save_file(
        {**tensors, "sources": torch.zeros(3, dtype=torch.int64)}, tmp_path / "samples.safetensors"
    )
    with pytest.raises(DataError, match="sources of 3 samples and has 8"):
        load_calibration(tmp_path, tokenizer)
