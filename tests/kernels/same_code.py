"""Whether kernels have the machine code of another revision: proves a refactoring, without a card.

    python -m tests.kernels.same_code main

compiles every instance whose text changed since `main`, there and here, for the oldest card and the
measured one, and compares what a card would run. Instances: those of test_nvrtc.py, and launches
that the planner makes for usual shapes, `--most` of each kernel.
"""

import argparse
import io
import itertools
import os
import random
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch

from qtool import resources
from qtool.errors import BackendError
from qtool.runtime.backends.cuda import panel_linear, plane_products, planes
from qtool.runtime.backends.cuda.launch import Card, KernelCall
from qtool.runtime.backends.cuda.panels import MOST_TILES, PanelLayout
from qtool.runtime.backends.cuda.sources import kernel_source
from qtool.runtime.backends.cuda.tiles import TILE_ROWS, UNIT
from tests.kernels.nvrtc import compile_for
from tests.kernels.test_nvrtc import HOPPER, HOPPER_VARIANTS, MEASURED, OLDEST, VARIANTS

CARDS = {
    MEASURED: Card(132, 227 * 1024, "NVIDIA H200", warpgroups=True, counts_bits=True),
    OLDEST: Card(108, 163 * 1024, "NVIDIA A100-SXM4-80GB", counts_bits=True),
}
SHAPES = (
    *((4096, 4096), (6144, 4096), (4096, 14336), (28672, 4096), (57344, 8192)),
    *((576, 576), (1536, 1000), (5120, 5120), (14336, 4096), (22016, 4096), (1000, 28672)),
)
TOKENS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 40)
DTYPES = (torch.float16, torch.bfloat16)
NOT_CODE = re.compile(r"\.(strtab|shstrtab|symtab|note.*|debug.*)")
COMMENTS = re.compile(r"//[^\n]*|\s+")
WITHOUT_BYTES = 8
"""Type of a section that takes memory and no bytes of the file."""

TRIES = 3
"""Once in hundreds of times NVRTC sets the flags of an instruction, of the same text, otherwise."""

Instance = tuple[str, str, tuple[tuple[str, int], ...]]
"""Architecture, file and constants."""
Section = tuple[int, int, int, int, bytes]
"""Type, flags, info (registers are a part of it), size and bytes."""


def planned_calls() -> Iterator[tuple[str, KernelCall]]:
    """Yield architectures and launches that products of usual shapes may be."""
    around = [
        plane_products.Around(epilogue, norm_eps=eps)
        for epilogue in planes.EPILOGUES
        for eps in (None, 1e-5)
    ]
    sizes = itertools.product(CARDS, SHAPES, TOKENS, (1, 2, 3, 4, 5, 8), (0, 1, 2), DTYPES, around)
    for architecture, (rows, inputs), tokens, bits, offset, dtype, each in sizes:
        if each.norm_eps and tokens > planes.MOST_IN_PAIRS:
            continue
        card, units = CARDS[architecture], -(-inputs // UNIT)
        shape = (rows, inputs, tokens)
        for group in (32, 96, 128, units * UNIT):
            whole = (*shape, -(-rows // TILE_ROWS), units, -(-inputs // group), rows)
            layout = planes.Layout(bits, group, offset)
            if not each.norm_eps or plane_products.normed_units(
                *whole[3:5], tokens, layout, card=card
            ):
                yield architecture, plane_products.call_for(whole, layout, dtype, card, each)
        for tiles, sets in itertools.product((3, MOST_TILES), (1, 2)):
            if (sets == 2) != (each.epilogue == "gated"):
                continue
            panels = -(-rows // (tiles * TILE_ROWS * sets))
            cut = (panels, units, rows, tiles * TILE_ROWS, 1)
            try:
                yield (
                    architecture,
                    panel_linear.panel_call(
                        (*shape, *cut), PanelLayout(bits, tiles, offset, sets), dtype, card, each
                    ),
                )
            except BackendError:
                continue  # another kernel runs it


def instances(most: int) -> list[Instance]:
    """Return those of test_nvrtc.py, then of each kernel and card `most` of the planner's."""
    listed = [(a, f, tuple(c.items())) for f, c, _ in VARIANTS for a in CARDS]
    listed += [(HOPPER, f, tuple(c.items())) for f, c, _ in HOPPER_VARIANTS]
    found: dict[tuple[str, str], dict[Instance, None]] = defaultdict(dict)
    for architecture, call in planned_calls():
        found[architecture, call.file][architecture, call.file, call.constants] = None
    for each in found.values():
        listed += random.Random(0).sample(sorted(each), min(most, len(each)))
    return list(dict.fromkeys(listed))


def sections(cubin: bytes) -> dict[str, Section]:
    """Return what a card is given of an ELF file: sections by name, with their flags and bytes."""
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<3H", cubin, 0x3A)
    heads = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + size * i) for i in range(count)]
    names, found = heads[names_at][4], {}
    for name, kind, flags, _, begin, length, _, info, *_ in heads:
        named = cubin[names + name : cubin.index(b"\0", names + name)].decode()
        if named and not NOT_CODE.fullmatch(named):
            held = b"" if kind == WITHOUT_BYTES else cubin[begin : begin + length]
            found[named] = (kind, flags, info, length, held)
    assert any(named.startswith(".text.") for named in found)
    return found


def changed_texts(instance: Instance, before: Path) -> tuple[str, str] | None:
    """Return the source here and there; None: they are the same but for comments."""
    _, file, constants = instance
    here = kernel_source(file, dict(constants))
    with mock.patch.object(resources, "kernels_dir", lambda: before):
        there = kernel_source(file, dict(constants))
    same = COMMENTS.sub(" ", here) == COMMENTS.sub(" ", there)
    return None if same else (here, there)


def differing(architecture: str, texts: tuple[str, str]) -> list[str]:
    """Return the sections that two sources don't have alike."""
    names: list[str] = []
    for _ in range(TRIES):
        one, other = (sections(compile_for(architecture, text).cubin) for text in texts)
        names = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
        if not names:
            break
    return names


def main() -> int:
    """Compare, and say what differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("revision", help="to compare with")
    parser.add_argument("--most", type=int, default=20, help="of each kernel and card, besides")
    parser.add_argument("--file", help="only this kernel")
    options = parser.parse_args()
    archive = subprocess.check_output(["git", "archive", options.revision, "kernels"])
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        before = Path(folder) / "kernels"
        found = {
            instance: texts
            for instance in instances(options.most)
            if options.file in (None, instance[1])
            and (before / f"{instance[1]}.cu").exists()
            and (texts := changed_texts(instance, before))
        }
    same: Counter[str] = Counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # half a second each
        compared = pool.map(lambda each: differing(each[0][0], each[1]), found.items())
        for instance, names in zip(found, compared, strict=True):
            same[f"{instance[1]} for {instance[0]}"] += not names
            if names:
                sys.stdout.write(f"differs in {names}: {instance}\n")
    for kernel, count in sorted(same.items()):
        sys.stdout.write(f"{kernel}: {count} instances of other text have the same code\n")
    sys.stdout.write(f"The code of {same.total()} is the same, of {len(found)} whose text isn't.\n")
    return same.total() != len(found)


if __name__ == "__main__":
    raise SystemExit(main())
