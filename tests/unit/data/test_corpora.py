import hashlib

import pytest

from qtool import resources
from qtool.data.corpora import bundled, load_corpus
from qtool.errors import DataError


@pytest.mark.parametrize(
    ("name", "role"), [("wikitext2-test", "test"), ("wikitext2-valid", "validation")]
)
def test_bundled_text_is_the_one_that_its_licence_describes(name, role):
    licence = (resources.texts_dir() / "LICENSE-wikitext2.md").read_text(encoding="utf-8")
    digest = hashlib.sha256(load_corpus(name).text.encode()).hexdigest()
    assert f"{role} `{digest}`" in licence.replace("\n  ", " ")


def test_bundled_texts_are_listed():
    assert bundled() == ("wikitext2-test", "wikitext2-valid")


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
