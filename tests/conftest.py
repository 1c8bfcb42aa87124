"""Settings of hypothesis, isolation from the user's machine, tiny models built once."""

import gc
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from qtool.core.native import building
from qtool.modeling.locate import Location

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test reaches a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads slow tiny tensors down threefold
os.environ.pop("QTOOL_BACKEND", None)
gc.set_threshold(20_000, 20, 20)  # a twelfth of the time went to collections of what is alive

# The same examples in every run; HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

ModelMaker = Callable[..., Path]
MADE = Path(__file__).parents[1] / "build" / "native"
"""Libraries of kernels/cpu that `make` has compiled."""


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep converted models out of the user's cache."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTOOL_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(_own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile each library of kernels/cpu once: it takes seconds, for each cache that is empty.

    The name tells text, flags and machine. All but the compiler's own work is done each time.
    """
    kept, compile_one = tmp_path_factory.mktemp("native"), building._run
    if MADE.is_dir():
        shutil.copytree(MADE, kept, dirs_exist_ok=True)
        shutil.copytree(MADE, _own_cache / "native")

    def run(command: list[str]) -> str | None:
        target = Path(command[command.index("-o") + 1])
        if not (kept / target.name).exists():
            if complaint := compile_one(command):
                return complaint
            shutil.copy(target, kept)
        shutil.copy(kept / target.name, target)
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "_run", run)
        yield


@pytest.fixture(scope="session", autouse=True)
def _unsynced() -> Iterator[None]:
    """Don't wait for the disk, dozens of times a checkpoint: no test outlives a loss of power.

    When files are synced is tested in tests/robustness/test_kills.py, by processes of their own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Draw the same numbers in every run, whichever tests the process ran before."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Leave what is imported out of garbage collections: each run of a task has some."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """Return a function (family, tied=False) -> directory of a tiny model with a tokenizer.

    Directories are shared by all tests: read only.
    """
    from tests import families

    made: dict[tuple[str, bool], Path] = {}

    def make(family: str = "llama", *, tied: bool = False) -> Path:
        if (family, tied) not in made:
            directory = tmp_path_factory.mktemp(f"{family}-{'tied' if tied else 'untied'}")
            families.build(family, tied=tied).save_pretrained(directory)
            families.save_tokenizer(directory)
            made[family, tied] = directory
        return made[family, tied]

    return make


@pytest.fixture(scope="session")
def llama(tiny: ModelMaker) -> Path:
    """Return a tiny llama with a head of its own; read only."""
    return tiny("llama")


@pytest.fixture(scope="session")
def chat_llama(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny llama with a chat template; read only."""
    from qtool.modeling.load import load_tokenizer

    directory = tmp_path_factory.mktemp("chats") / "chatty"
    shutil.copytree(llama, directory)
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m.content }} </s> {% endfor %}"
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def checkpoint(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny llama quantized with rtn to 4 bits, group 32; read only."""
    from qtool import pipeline
    from tests.helpers import recipe

    out_dir = tmp_path_factory.mktemp("quantized") / "checkpoint"
    pipeline.quantize(Location(llama), out_dir, recipe())
    return out_dir


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text of 600 words that the tiny tokenizer knows; read only."""
    from tests.families import text

    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text(600), encoding="utf-8")
    return path


@pytest.fixture(scope="session", params=["tied", "untied"])
def mixed_tables(request: Any, tiny: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny quantized llama whose embedding and head have rows of 5 to 1 bits."""
    from qtool import pipeline
    from tests.helpers import recipe
    from tests.mixed import mixed_checkpoint

    folder = tmp_path_factory.mktemp("mixed")
    pipeline.quantize(Location(tiny("llama", tied=request.param == "tied")), folder / "a", recipe())
    row_bits = [5 - min(row % 7, 4) if row else 8 for row in range(96)]  # 8 bits: one row
    return mixed_checkpoint(folder / "a", folder / "b", row_bits, 32)
