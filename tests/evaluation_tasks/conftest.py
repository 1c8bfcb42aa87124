"""Tiny models that lm-eval can ask, and data for it; the index of lm-eval is read once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool import pipeline
from qtool.evaluation.lm_eval.harness import Tasks
from qtool.evaluation.lm_eval.hooks import task_manager
from qtool.evaluation.lm_eval.options import TaskOptions
from qtool.modeling.locate import Location
from qtool.pipeline import scoring
from qtool.pipeline.task_results import TaskComparison
from qtool.storage.store import Store
from tests import families
from tests.task_rows import write_all

POSITIONS = 2048
Evaluate = Callable[..., TaskComparison]


def save(model: Any, directory: Path) -> Path:
    """Write a model with the tiny tokenizer."""
    model.save_pretrained(directory)
    families.save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session", autouse=True)
def _loaded() -> None:
    """Load what every run needs before the first module's objects are frozen."""

    task_manager()


@pytest.fixture(scope="session")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny llama with room for real prompts; read only."""
    model = families.build("llama", max_position_embeddings=POSITIONS)
    return save(model, tmp_path_factory.mktemp("long-llama"))


@pytest.fixture(scope="session")
def brief_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one that soon ends its answers; read only."""
    model = families.build("llama", max_position_embeddings=POSITIONS)
    head = model.lm_head.weight.data
    head[model.config.eos_token_id] = 1.5 * head[17]
    return save(model, tmp_path_factory.mktemp("brief-llama"))


@pytest.fixture(scope="session")
def long_checkpoint(long_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return it quantized to 3 bits; read only."""
    from tests.helpers import recipe

    out_dir = tmp_path_factory.mktemp("long") / "checkpoint"
    pipeline.quantize(Location(long_llama), out_dir, recipe(num_bits=3))
    return out_dir


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data folder with invented rows and the sample; read only."""
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep scores of each test apart, and models off a card."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def evaluate(long_llama: Path, data: Path) -> Evaluate:
    """Return a function that runs tasks on the tiny llama: (tasks, model, options of either)."""

    def run(*tasks: str, model: Path = long_llama, **options: Any) -> TaskComparison:
        adapter = options.pop("adapter", None)
        names = ("baseline", "backend", "dtype", "emit")
        others = {key: options.pop(key) for key in names if key in options}
        asked = TaskOptions(tasks=tasks, **{"data_dir": data, **options})
        where = Location(model, adapter=adapter)
        result = pipeline.evaluate(where, pipeline.EvalOptions(tasks=asked), **others)
        assert result.tasks is not None
        return result.tasks

    return run


def asked_of(*tasks: str, **options: Any) -> Tasks:
    """Return lm-eval's tasks with the options of TaskOptions, unchecked."""
    return Tasks(TaskOptions(tasks=tasks, **options))


def kept_answers() -> int:
    """Return how many answers are kept of runs that didn't end."""
    with Store() as store:
        return sum(kept.entries for kept in store.summary() if kept.kind == "answers")


class LoadsModelError(BaseException):
    """A model is loaded where none may be; no failure of a task, which the run would survive."""


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a model is loaded."""

    def load_model(*_args: Any, **_kwargs: Any) -> Any:
        raise LoadsModelError

    monkeypatch.setattr(scoring, "load_model", load_model)
