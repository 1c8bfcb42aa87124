"""The guard: which special tokens the samples have, and which inference will send."""

import pytest
import torch

from qtool.data.special_tokens import count_special, document_ends, protected_tokens
from tests.families import save_tokenizer

TEMPLATE = "{% for m in messages %}<s> {{ m.content }} {% endfor %}"


@pytest.fixture
def tokenizer(tmp_path):
    from qtool.modeling.load import load_tokenizer

    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return load_tokenizer(tmp_path)


def test_counts_are_of_all_samples(tokenizer):
    samples = [torch.tensor([1, 5, 1, 2]), torch.tensor([9, 2])]
    found = count_special(tokenizer, samples)
    assert found.counts == {"<s>": 2, "</s>": 2}
    assert "<s> 2, </s> 2" in found.sentence()
    assert found.warning("mine") is None


def test_token_of_the_template_that_no_sample_has_is_warned_of(tokenizer):
    samples = [torch.tensor([5, 6, 2])]
    assert count_special(tokenizer, samples).missing == ()
    tokenizer.chat_template = TEMPLATE
    found = count_special(tokenizer, samples)
    assert found.missing == ("<s>",)
    assert "No sample of mine has <s>, which prompts" in (found.warning("mine") or "")


def test_token_that_the_tokenizer_adds_is_expected(tokenizer):
    class AddsBos(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, words, *, add_special_tokens=True, **options):
            found = super().__call__(words, **options)["input_ids"]
            return {"input_ids": [1, *found] if add_special_tokens else found}

    tokenizer.__class__ = AddsBos
    assert count_special(tokenizer, [torch.tensor([5])]).missing == ("<s>",)
    assert count_special(tokenizer, [torch.tensor([1, 5])]).missing == ()


def test_template_that_fails_expects_nothing(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert count_special(tokenizer, [torch.tensor([5])]).missing == ()


def test_eos_ends_documents_and_so_does_what_the_vocabulary_has_for_it(tokenizer):
    assert document_ends(tokenizer) == (2,)
    tokenizer.eos_token = "w9"
    assert document_ends(tokenizer)[0] == 9


def test_special_and_written_tokens_and_single_bytes_are_protected(tokenizer):
    names = ["<0x0A>", "<0xff>", "Ġ", "a", "ń", "語", "ab", "<0x0>"]
    tokenizer.add_tokens(names)
    tokenizer.chat_template = "{% for m in messages %}w90 {{ m.content }} {% endfor %}"
    kept = protected_tokens(tokenizer)
    found = [name for name in names if tokenizer.convert_tokens_to_ids(name) in kept]
    assert found == ["<0x0A>", "<0xff>", "Ġ", "a"]  # ń isn't what byte-level BPE writes a byte as
    written = {"<s>", "</s>", "w90"}
    assert {tokenizer.convert_tokens_to_ids(name) for name in written} <= kept
    assert tokenizer.convert_tokens_to_ids("w50") not in kept
