"""Globs on dotted names of layers."""

import re
from fnmatch import fnmatchcase

_OF_EXPERTS = re.compile(r"(?P<fused>.*[\w*?])\[(?P<index>.+)\]")


def matches(layer: str, glob: str) -> bool:
    """Return whether a glob is that of a layer, by its dotted name.

    The layer of one expert, such as `mlp.experts.down_proj[7]`, is matched as well by the name that
    all experts share, `*.down_proj`; and a number in brackets at the end of a glob, which may be
    one itself (`[1?]`, `[[0-3]]`), is that of the expert, though brackets elsewhere are a choice of
    characters.
    """
    if fnmatchcase(layer, glob):
        return True
    fused, bracket, index = layer.partition("[")
    if not bracket:
        return False
    if fnmatchcase(fused, glob):
        return True
    found = _OF_EXPERTS.fullmatch(glob)
    return (
        found is not None
        and fnmatchcase(fused, found["fused"])
        and fnmatchcase(index.removesuffix("]"), found["index"])
    )
