"""Licences of the bundled texts, in a word each; qtool/data/texts/LICENSE-texts.md has the rest."""

from collections.abc import Mapping

from qtool.data.corpora import WRITTEN_BY_THE_MODEL
from qtool.data.documents import HUB_PREFIX

_WIKIPEDIA = "CC BY-SA 3.0"
_FREE = "public domain"
TEXT_LICENCES: Mapping[str, str] = {
    "dialogues": f"Apache-2.0, MIT, {_FREE}",
    "dialogues-test": "Apache-2.0",
    "gsm8k-train": "MIT",
    "languages": f"{_FREE}, Apache-2.0",
    "prose": f"{_FREE}, CC0 1.0, PDDL 1.0",
    "source-code": "MIT",
    "wikitext2-test": _WIKIPEDIA,
    "wikitext2-valid": _WIKIPEDIA,
}


def text_licence(name: str) -> str:
    """Return the licence of a text to calibrate on, or who knows it."""
    if name == WRITTEN_BY_THE_MODEL:
        return "written by the original"
    if name.startswith(HUB_PREFIX):
        return "see its page on the hub"
    return TEXT_LICENCES.get(name, "a file of whoever made this: ask there")
