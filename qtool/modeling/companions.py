"""The small files that belong to a model: tokenizer, chat templates, generation, licence."""

import json
import logging
from codecs import BOM_UTF8
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from qtool.errors import ModelError
from qtool.storage.plain_json import config_text
from qtool.wording import reason

_LOG = logging.getLogger(__name__)

TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "vocab.bpe",
    "merges.txt",
    "bpe.codes",
    "emoji.json",
    "byte_maps.json",
    "dict.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.tokenizer",
)
"""As transformers' tokenizers call their files."""
TEMPLATES = ("*.jinja", "chat_template.json", "chat_template.jsonl")
TEMPLATE_FOLDER = "additional_chat_templates"
GENERATION = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
COPIED = (*TOKENIZER, *TEMPLATES, *GENERATION, *LICENCES)


def read_companions(directory: Path) -> dict[str, bytes]:
    """Return the files to copy beside the weights, by their path relative to the directory.

    Links are followed inside the directory, and into the blobs of the hub's cache that it is a
    snapshot of; a link to elsewhere, which might carry a private file along, is left out with a
    warning. What names code of the original is removed from JSON.

    Raises:
        ModelError: one can't be read, or is a tokenizer's JSON and none, or as `check_marks`.
    """
    try:
        check_marks(directory)
        return {
            path.relative_to(directory).as_posix(): _without_code(path)
            for path in beside_weights(directory)
            if path.is_file() and _stays_inside(path, directory)
        }
    except OSError as error:
        raise ModelError(
            f"{directory}: a file beside the weights can't be read: {error}"
        ) from error


def beside_weights(directory: Path) -> Iterator[Path]:
    """Yield the small files that belong to a model."""
    for path in sorted(directory.iterdir()):
        if any(fnmatchcase(path.name, pattern) for pattern in COPIED):
            yield path
    templates = directory / TEMPLATE_FOLDER
    if templates.is_dir():
        yield from sorted(templates.glob("*.jinja"))


def _stays_inside(path: Path, directory: Path) -> bool:
    target = path.resolve()
    root = directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if any(target.is_relative_to(folder) for folder in allowed):
        return True
    _LOG.warning("%s is a link that leaves the model's directory; it isn't copied.", path)
    return False


def check_marks(directory: Path) -> None:
    """Refuse JSON of a tokenizer that starts with a byte order mark: transformers can't read it.

    Raises:
        ModelError: one does.
    """
    for path in beside_weights(directory):
        is_tokenizer = any(fnmatchcase(path.name, pattern) for pattern in TOKENIZER)
        if is_tokenizer and path.suffix == ".json" and path.is_file():
            with path.open("rb") as file:
                if file.read(len(BOM_UTF8)) == BOM_UTF8:
                    raise ModelError(
                        f"{path} starts with a byte order mark, which transformers can't read. "
                        "Save it as UTF-8 without one."
                    )


def _without_code(path: Path) -> bytes:
    """Return a file's content; from a JSON object what names remote code is removed.

    Other JSON that can't be read is copied: a model may be loaded without it. A template loses a
    byte order mark, which would be said to the model.
    """
    content = path.read_bytes()
    if path.suffix == ".jinja":
        return content.removeprefix(BOM_UTF8)
    is_tokenizer = fnmatchcase(path.name, "tokenizer*.json")
    if path.suffix != ".json" or not (is_tokenizer or b"auto_map" in content):
        return content
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if not is_tokenizer:
            return content
        raise ModelError(
            f"{path} isn't valid JSON: {reason(error)}. Download it again: what is made of the "
            "model would have a tokenizer that nobody can load."
        ) from error
    if not isinstance(values, dict) or "auto_map" not in values:
        return content
    del values["auto_map"]
    text = config_text(values)
    # Half of a surrogate pair, which UTF-8 lacks, stays the escape that it was.
    return text.encode(errors="backslashreplace")
