"""Metadata of a GGUF file as the files of a tokenizer: the inverse of `_gguf_tokens`.

What a file says plainly isn't left to transformers: it takes all tokenizers of an architecture for
alike, and its releases differ: 5.17 ends the texts of SmolLM2 with the token that begins them.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from qtool.exchange._gguf_tokens import (
    BYTE_LEVEL,
    CONTROL,
    CUTS,
    NORMALIZED,
    OTHER_CUT_NAMES,
    SETTINGS_NAME,
    SPECIAL_KEYS,
    SPECIAL_NAME,
    TOKENIZER_NAME,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS_FIRST,
    json_object,
)
from qtool.storage.plain_json import json_text

_Said = Mapping[str, Any]
"""What the keys `tokenizer.ggml.*` say, without that in front."""


def as_metadata_say(files: Mapping[str, bytes], metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of a tokenizer that does what its GGUF file says.

    Special tokens are the file's, of whatever kind the tokenizer is. A byte-level one that cuts a
    text in a known way is the file's altogether.

    Args:
        files: What transformers has made of it.
        metadata: The file's.
    """
    front = "tokenizer.ggml."
    said = {key.removeprefix(front): one for key, one in metadata.items() if key.startswith(front)}
    found, special = dict(files), _special_tokens(said)
    for name in (SETTINGS_NAME, SPECIAL_NAME):
        if name in files:
            found[name] = _with_special_tokens(json_object(files, name), special, said)
    pre = OTHER_CUT_NAMES.get(str(said.get("pre")), said.get("pre"))
    steps = next((steps for steps, name in CUTS.items() if name == pre), None)
    if said.get("model") != BYTE_LEVEL or steps is None or not said.keys() >= WHOLE:
        return found
    there = json_object(files, TOKENIZER_NAME)
    normalizer = there.get("normalizer")
    keeps = pre in NORMALIZED and normalizer is not None and normalizer.get("type") == "NFC"
    bytes_step = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(said),
        "normalizer": normalizer if keeps else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [PRE_TOKENIZERS[kind](value) for kind, value in steps],
        },
        "post_processor": _around(said, special, there.get("post_processor")),
        "decoder": {**bytes_step, "use_regex": True},
        "model": _merging(said, {*special.values()}, whole=pre in WHOLE_WORDS_FIRST),
    }
    return {**found, TOKENIZER_NAME: json_text(tokenizer, ascii_only=False).encode()}


WHOLE = {"tokens", "token_type", "merges"}
"""Keys that a byte-level tokenizer is made of."""


def _special_tokens(said: _Said) -> dict[str, str]:
    """Return special tokens by transformers' names for them."""
    tokens, found = said.get("tokens", []), {}
    for name, key in SPECIAL_KEYS.items():
        number = said.get(f"{key}_token_id")
        if type(number) is int and 0 <= number < len(tokens):
            found[f"{name}_token"] = tokens[number]
    return found


def _with_special_tokens(
    settings: dict[str, Any], special: Mapping[str, str], said: _Said
) -> bytes:
    for name in ("add_bos_token", "add_eos_token"):  # classes of transformers 4 heed them
        if name in settings and name in said:
            settings[name] = bool(said[name])
    for name, token in special.items():
        settings.pop(f"{name}_id", None)  # some releases save it, maybe of another token
        there = settings.get(name)
        if (there.get("content") if isinstance(there, dict) else there) != token:
            settings[name] = token
    return json_text(settings, ascii_only=False).encode()


def _added_tokens(said: _Said) -> list[dict[str, Any]]:
    never = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": number, "content": token, **never, "special": kind == CONTROL}
        for number, (token, kind) in enumerate(zip(said["tokens"], said["token_type"], strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]


def _merging(said: _Said, special: Container[str], *, whole: bool) -> dict[str, Any]:
    """Return tokens and how they come to be; rows that no token has stay without."""
    kinds = enumerate(zip(said["tokens"], said["token_type"], strict=True))
    vocabulary = {
        token: number for number, (token, kind) in kinds if kind != UNUSED or token in special
    }
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": whole,
        "vocab": vocabulary,
        "merges": [merge.split(" ", 1) for merge in said["merges"]],
    }


def _around(said: _Said, special: Mapping[str, str], there: Any) -> Any:  # noqa: ANN401
    """Return what puts tokens before and after a text; `there`, where the file doesn't say."""
    if "add_bos_token" not in said and "add_eos_token" not in said:
        return there
    before, after = (
        [special[f"{name}_token"]]
        if said.get(f"add_{name}_token") and f"{name}_token" in special
        else []
        for name in ("bos", "eos")
    )
    numbers = {token: said["tokens"].index(token) for token in (*before, *after)}
    return {
        "type": "TemplateProcessing",
        "single": _template(before, "A", 0, after),
        "pair": _template(before, "A", 0, after) + _template(before, "B", 1, after),
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for token, number in numbers.items()
        },
    }


def _template(
    before: Sequence[str], text: str, kind: int, after: Sequence[str]
) -> list[dict[str, Any]]:
    def put(tokens: Sequence[str]) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": token, "type_id": kind}} for token in tokens]

    return [*put(before), {"Sequence": {"id": text, "type_id": kind}}, *put(after)]


PRE_TOKENIZERS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "bytes": lambda use_regex: {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    },
    "digits": lambda individual: {"type": "Digits", "individual_digits": individual},
    "split": lambda words: {
        "type": "Split",
        "pattern": {"Regex": words},
        "behavior": "Isolated",
        "invert": False,
    },
}
"""The inverse of `cut_steps`."""
