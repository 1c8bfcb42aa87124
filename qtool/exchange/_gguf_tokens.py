"""tokenizer.json as the metadata of a GGUF file, or why llama.cpp would cut a text otherwise.

llama.cpp has its own code for each way to cut a text into words, and a name for it
(`tokenizer.ggml.pre`; llama-vocab.cpp). Only ways stand here that are known to be the same.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtool.wording import list_names, reason, shown

TOKENIZER_NAME, SETTINGS_NAME = "tokenizer.json", "tokenizer_config.json"
TEMPLATE_NAME, SPECIAL_NAME = "chat_template.jinja", "special_tokens_map.json"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = rf"{_ENGLISH}\p{{N}}{{1,3}}{_OTHERS}"
QWEN2_WORDS = rf"{_ENGLISH}\p{{N}}{_OTHERS}"
CutStep = tuple[str, Any]
CUTS: Mapping[tuple[CutStep, ...], str] = {
    (("bytes", True),): "gpt-2",
    (("digits", True), ("bytes", True)): "smollm",
    (("split", LLAMA3_WORDS), ("bytes", False)): "llama-bpe",
    (("split", QWEN2_WORDS), ("bytes", False)): "qwen2",
}
"""llama.cpp's name by the steps of a `pre_tokenizer`."""
OTHER_CUT_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
"""Names that files have for the same way."""
WHOLE_WORDS_FIRST = ("llama-bpe",)
"""Where llama.cpp takes a word that is a token as it is (`ignore_merges`)."""
NORMALIZED = ("qwen2",)
"""What llama.cpp's converter takes for it although tokenizer.json normalizes (NFC)."""
AROUND_TOKENS = ("lstrip", "rstrip", "single_word")
"""Of an added token: it takes spaces beside it, or isn't found within a word."""
BYTE_LEVEL = "gpt2"
"""What GGUF calls byte-level BPE."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
SPECIAL_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""What tokenizer_config.json and GGUF call special tokens."""


class _UnsaidError(Exception):
    """Why a tokenizer can't be written, as a clause."""


@dataclass(frozen=True, slots=True)
class _Files:
    tokenizer: Mapping[str, Any]
    settings: Mapping[str, Any]
    """tokenizer_config.json, over special_tokens_map.json."""
    text: str
    template: str | None


def why_no_tokenizer(
    files: Mapping[str, bytes], config: Mapping[str, Any], vocabulary: int
) -> str | None:
    """Return why a tokenizer can't be written, as a clause; None: it can."""
    try:
        _tokenizer(files, config, vocabulary)
    except _UnsaidError as error:
        return str(error)
    return None


def tokenizer_metadata(
    files: Mapping[str, bytes], config: Mapping[str, Any], vocabulary: int
) -> dict[str, Any]:
    """Return the keys `tokenizer.*`; `why_no_tokenizer` has been asked.

    Args:
        files: Companions of a model, by their names.
        config: config.json, which knows special tokens that the tokenizer's files don't.
        vocabulary: Rows of the embedding; those that no token has get a name of their own.
    """
    return _tokenizer(files, config, vocabulary)


def _tokenizer(
    files: Mapping[str, bytes], config: Mapping[str, Any], vocabulary: int
) -> dict[str, Any]:
    read = _read(files)
    model = read.tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _UnsaidError("its tokenizer isn't byte-level BPE")
    pre = _cut_of(read.tokenizer, model)
    _check_spaces(read)
    tokens, kinds = _tokens(read.tokenizer, model, vocabulary)
    ids = _special_ids(read, config, tokens)
    ordinary = [token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL]
    before, after = _added(read.text, ordinary)
    if before not in ([], [ids.get("bos")]) or after not in ([], [ids.get("eos")]):
        raise _UnsaidError(
            "its tokenizer puts other tokens around a text than one at its beginning and its end"
        )
    found = {
        "model": BYTE_LEVEL,
        "pre": pre,
        "tokens": tokens,
        "token_type": kinds,
        "merges": [_merge(each) for each in model["merges"]],
        **{f"{SPECIAL_KEYS[name]}_token_id": number for name, number in ids.items()},
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
    }
    template = {} if read.template is None else {"tokenizer.chat_template": read.template}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()} | template


def _read(files: Mapping[str, bytes]) -> _Files:
    if TOKENIZER_NAME not in files:
        raise _UnsaidError(f"a file has its tokenizer in it, and there is no {TOKENIZER_NAME}")
    settings = json_object(files, SPECIAL_NAME) | json_object(files, SETTINGS_NAME)
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template}
        template = named.get("default")
    if TEMPLATE_NAME in files:
        template = files[TEMPLATE_NAME].decode(errors="replace")
    return _Files(
        tokenizer=json_object(files, TOKENIZER_NAME),
        settings=settings,
        text=files[TOKENIZER_NAME].decode(errors="replace"),
        template=template if isinstance(template, str) else None,
    )


def json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        found = json.loads(files.get(name, b"{}").decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _UnsaidError(f"{name} can't be read ({reason(error)})") from error
    return found if isinstance(found, dict) else {}


def _cut_of(tokenizer: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how a text is cut."""
    steps = tuple(cut_steps(tokenizer.get("pre_tokenizer") or {}))
    pre = CUTS.get(steps)
    if pre is None:
        raise _UnsaidError(
            f"its tokenizer cuts a text in a way that isn't one of {', '.join(CUTS.values())}"
        )
    if bool(model.get("ignore_merges")) != (pre in WHOLE_WORDS_FIRST):
        raise _UnsaidError(f"its tokenizer has ignore_merges otherwise than {pre} of llama.cpp")
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if normalizer is not None and not (normalizer == "NFC" and pre in NORMALIZED):
        raise _UnsaidError(f"its tokenizer normalizes a text ({shown(normalizer)})")
    if not model.get("merges"):
        raise _UnsaidError("its tokenizer has no merges, and llama.cpp reads none without")
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if affixes or model.get("dropout"):
        raise _UnsaidError("its tokenizer marks parts of words, or drops merges")
    return pre


def _check_spaces(read: _Files) -> None:
    """Refuse what a file can't say of spaces: tokens that take them, one that is put first."""
    if read.settings.get("add_prefix_space"):  # stronger than what tokenizer.json says
        raise _UnsaidError(f"its tokenizer puts a space before a text ({SETTINGS_NAME})")
    odd = [
        f"{shown(str(each.get('content')))} ({key})"
        for each in read.tokenizer.get("added_tokens") or []
        for key in AROUND_TOKENS
        if each.get(key)
    ]
    if odd:
        raise _UnsaidError(f"its tokenizer looks at what stands around tokens: {list_names(odd)}")


def cut_steps(pre: Mapping[str, Any]) -> list[CutStep]:
    """Return what a `pre_tokenizer` does, one step after the other."""
    kind = pre.get("type")
    if kind == "Sequence":
        return [step for each in pre.get("pretokenizers", []) for step in cut_steps(each)]
    if kind == "ByteLevel" and not pre.get("add_prefix_space", True):
        return [("bytes", pre.get("use_regex", True))]
    if kind == "Digits":
        return [("digits", pre.get("individual_digits", False))]
    if kind == "Split" and pre.get("behavior") == "Isolated" and not pre.get("invert"):
        return [("split", (pre.get("pattern") or {}).get("Regex"))]
    return [("other", str(kind))]


def _tokens(
    tokenizer: Mapping[str, Any], model: Mapping[str, Any], vocabulary: int
) -> tuple[list[str], list[int]]:
    """Return tokens and their types, one per row of the embedding."""
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    kinds = [UNUSED] * vocabulary
    added = tokenizer.get("added_tokens") or []
    ordinary = [(number, token, NORMAL) for token, number in model.get("vocab", {}).items()]
    marked = [
        (each["id"], each["content"], CONTROL if each.get("special") else USER_DEFINED)
        for each in added
    ]
    for number, token, kind in ordinary + marked:
        if not 0 <= number < vocabulary:
            raise _UnsaidError(
                f"its token {shown(token)} has number {number}, and the embedding has "
                f"{vocabulary} rows"
            )
        tokens[number], kinds[number] = token, kind
    return tokens, kinds


def _special_ids(read: _Files, config: Mapping[str, Any], tokens: list[str]) -> dict[str, int]:
    """Return the numbers of special tokens: by the tokenizer's files, else by config.json."""
    numbers, found = {token: number for number, token in enumerate(tokens)}, {}
    for name in SPECIAL_KEYS:
        token, number = read.settings.get(f"{name}_token"), config.get(f"{name}_token_id")
        text = token.get("content") if isinstance(token, dict) else token
        if text in numbers:
            found[name] = numbers[text]
        elif type(number) is int and 0 <= number < len(tokens):
            found[name] = number
    return found


def _added(text: str, words: list[str]) -> tuple[list[int], list[int]]:
    """Return the numbers of tokens that are put before and after a text.

    Args:
        text: tokenizer.json.
        words: To try it with: ordinary tokens, since others may be what is put there.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
        encoded = ((each, tokenizer.encode(each, add_special_tokens=False).ids) for each in words)
        word, bare = next((each, ids) for each, ids in encoded if ids)
        whole = tokenizer.encode(word).ids
    except Exception as error:  # it raises nothing narrower
        raise _UnsaidError(f"{TOKENIZER_NAME} can't be read ({reason(error)})") from error
    at = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    return whole[:at], whole[at + len(bare) :]


def _merge(pair: str | list[str]) -> str:
    """Return a merge as one text: a blank within a part is `Ġ`, as GGUF's writer has it."""
    if isinstance(pair, str):
        return pair
    return " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair)
