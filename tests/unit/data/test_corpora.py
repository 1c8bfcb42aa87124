import hashlib
import re
from types import SimpleNamespace

import pytest
import torch

from qtool import resources
from qtool.data.corpora import (
    Corpus,
    bos_warning,
    bundled,
    check_tokens,
    load_corpus,
    open_dataset,
)
from qtool.data.documents import Collection
from qtool.errors import DataError
from qtool.recipe.calibration import CalibrationSection


@pytest.mark.parametrize(
    ("name", "role"), [("wikitext2-test", "test"), ("wikitext2-valid", "validation")]
)
def test_bundled_text_is_the_one_that_its_licence_describes(name, role):
    licence = (resources.texts_dir() / "LICENSE-texts.md").read_text(encoding="utf-8")
    digest = hashlib.sha256(load_corpus(name).text.encode()).hexdigest()
    assert f"{role} `{digest}`" in licence.replace("\n  ", " ")


def test_bundled_texts_are_listed():
    documents = ("dialogues", "dialogues-test", "gsm8k-train", "languages", "prose", "source-code")
    assert bundled() == (*documents, "wikitext2-test", "wikitext2-valid")


def test_bundled_texts_are_small_and_their_licences_are_told():
    files = list(resources.texts_dir().iterdir())
    assert sum(file.stat().st_size for file in files) <= 3_000_000
    licence = (resources.texts_dir() / "LICENSE-texts.md").read_text(encoding="utf-8")
    assert [file.name for file in files if file.suffix == ".xz" and file.name not in licence] == []


@pytest.mark.parametrize(
    ("name", "kind", "least"),
    [
        ("dialogues", list, 500),
        ("dialogues-test", list, 40),
        ("gsm8k-train", list, 3000),
        ("languages", str, 50),
        ("prose", str, 300),
        ("source-code", str, 500),
    ],
)
def test_bundled_documents_are_opened_by_name(name, kind, least):
    collection = open_dataset(name)
    assert isinstance(collection, Collection)
    contents = [document.content for document in collection.documents]
    assert collection.name == name
    assert len(contents) >= least
    assert all(isinstance(content, kind) and content for content in contents)


def words_in_a_row(name, count=13):
    """Return all runs of so many words in a bundled text."""
    texts = open_dataset(name)
    contents = [texts.text] if isinstance(texts, Corpus) else [d.content for d in texts.documents]
    turns = [turn["content"] for one in contents if not isinstance(one, str) for turn in one]
    plain = [one for one in contents if isinstance(one, str)]
    found = [re.findall(r"\w+", text.lower()) for text in [*turns, *plain]]
    return {tuple(one[at : at + count]) for one in found for at in range(len(one) - count + 1)}


def test_chats_to_measure_on_are_in_no_text_to_calibrate_on():
    held_out = words_in_a_row("dialogues-test")
    assert len(held_out) > 1500
    for part in CalibrationSection().sources:
        assert part.dataset != "dialogues-test"
        assert not held_out & words_in_a_row(part.dataset)


def test_bundled_documents_are_joined_to_a_running_text_and_chats_are_not():
    assert load_corpus("prose").name == "prose"
    with pytest.raises(DataError, match="is a chat, and a running text is needed"):
        load_corpus("dialogues")


def test_own_text_is_read_and_named_after_its_file(text_file):
    corpus = load_corpus(str(text_file))
    assert corpus.name == "words.txt"
    assert len(corpus.text.split()) == 600


def test_unknown_text_suggests_the_nearest():
    with pytest.raises(DataError, match=r"Did you mean 'wikitext2-test'.* path, ending in \.txt"):
        load_corpus("wikitext2-tset")


def test_missing_or_unreadable_text_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="No file"):
        load_corpus(str(tmp_path / "nothing.txt"))
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="line 1 isn't UTF-8"):
        load_corpus(str(tmp_path / "latin.txt"))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match="can't be read: it is a directory"):
        load_corpus(str(tmp_path / "folder.txt"))


def test_joined_documents_leave_out_what_is_empty(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w3"}\n{"text": " "}\n{"text": ""}\n{"text": "w4"}\n')
    assert load_corpus(str(path)).text == "w3\n\nw4"


@pytest.mark.parametrize(("tokens", "bad"), [([0, 95, 96], 96), ([3, -1], -1), ([[5], [200]], 200)])
def test_token_without_an_embedding_is_named(tokens, bad):
    with pytest.raises(DataError, match=f"mine has token {bad}, .* embedding 96 rows"):
        check_tokens(torch.tensor(tokens), 96, "mine")


def test_tokens_with_embeddings_are_taken():
    check_tokens(torch.tensor([[0, 95]]), 96, "mine")
    check_tokens(torch.empty(0, dtype=torch.int64), 96, "mine")


@pytest.mark.parametrize(
    ("kind", "pieces", "warned"),
    [
        ("gemma2", [[1, 5], [6, 7], [8, 9]], "2 of 3 pieces of mine"),
        ("recurrent_gemma", [[1, 5], [6, 7]], "1 of 2 pieces of mine"),
        ("gemma3_text", [[1, 5], [1, 7]], None),  # each document begins with it
        ("gemma", [[1, 5]], None),
        ("gemma", [[4, 5], [6, 7]], None),  # the tokenizer adds none
        ("llama", [[1, 5], [6, 7]], None),
    ],
)
def test_pieces_without_bos_are_warned_of_where_it_matters(kind, pieces, warned):
    message = bos_warning(kind, SimpleNamespace(bos_token_id=1), torch.tensor(pieces), "mine")
    assert (message is None) == (warned is None)
    assert (warned or "") in (message or "")
