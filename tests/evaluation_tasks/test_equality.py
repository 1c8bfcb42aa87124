"""Our scores are those of lm-eval itself, to the last digit: its model class, its reading of data.

lm-eval gets the same rows through task files of its own kind (`include`, `data_files`), so that
nothing of this tool is on its side.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtool.storage.jsonl import json_objects
from tests.evaluation_tasks.conftest import Evaluate

Original = Callable[..., dict[str, Any]]
FILES = {
    "wikitext": ("wikitext/wikitext.yaml", "test", "lm/wikitext2_raw_test_pages.jsonl"),
    "lambada_openai": ("lambada/lambada_openai.yaml", "test", "lm/lambada_openai_test.jsonl"),
    "arc_easy": ("arc/arc_easy.yaml", "test", "mcqa/arc_easy_test.jsonl"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", "mcqa/hellaswag_val.jsonl"),
    "piqa": ("piqa/piqa.yaml", "validation", "mcqa/piqa_val.jsonl"),
    "winogrande": ("winogrande/default.yaml", "validation", "mcqa/winogrande_xl_val.jsonl"),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", "validation", "mcqa/truthfulqa.jsonl"),
}
SUBJECTS = ("astronomy", "marketing")


def task_file(folder: Path, name: str, include: str, files: dict[str, str]) -> None:
    import lm_eval.tasks

    shipped = Path(lm_eval.tasks.__file__).parent / include
    splits = ("training_split", "validation_split", "test_split")
    config = {
        "include": str(shipped),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "datasets")},
        **{key: None for key in splits if key.removesuffix("_split") not in files},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def original(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Original:
    """Return a function that runs lm-eval alone: (model directory, tasks, options)."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    for name, (include, split, file) in FILES.items():
        task_file(folder, name, include, {split: str(data / file)})
    for subject in SUBJECTS:
        files = {}
        for split in ("dev", "test"):
            rows = json_objects(data / f"mcqa/mmlu_{split}.jsonl.gz")
            lines = [json.dumps(row) for row in rows if row["subject"] == subject]
            files[split] = str(folder / f"{subject}_{split}.jsonl")
            Path(files[split]).write_text("\n".join(lines))
        task_file(folder, f"mmlu_{subject}", f"mmlu/default/mmlu_{subject}.yaml", files)
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def run(directory: Path, *tasks: str, **options: Any) -> dict[str, Any]:
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(directory), "dtype": "float32"},
            tasks=list(tasks),
            device="cpu",
            task_manager=manager,
            bootstrap_iters=0,
            **options,
        )
        assert results is not None
        return results

    return run


def metrics_of(results: dict[str, Any], task: str) -> dict[str, float]:
    """Return the numbers by "metric,filter"."""
    return {
        key: value
        for key, value in results["results"][task].items()
        if "," in key and "_stderr" not in key
    }


def ours(evaluate: Evaluate, *tasks: str, **options: Any) -> dict[str, dict[str, float | None]]:
    """Return the same by task."""
    found: dict[str, dict[str, float | None]] = {}
    for row in evaluate(*tasks, **options).rows:
        found.setdefault(row.task, {})[f"{row.metric},{row.filter}"] = row.value
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_lm_eval(evaluate, original, long_llama, batch_size):
    found = ours(evaluate, *FILES, batch_size=batch_size)
    for task in FILES:
        expected = metrics_of(original(long_llama, task, batch_size=batch_size), task)
        assert expected
        assert found[task] == expected, task


def test_examples_in_the_prompt_are_those_of_lm_eval(evaluate, original, long_llama):
    names = [f"mmlu_{subject}" for subject in SUBJECTS]
    found = ours(evaluate, *names, batch_size=4)
    for name in names:
        results = original(long_llama, name, batch_size=4, num_fewshot=5)
        assert results["n-shot"][name] == 5
        assert found[name] == metrics_of(results, name)


def test_default_batch_is_eight_and_one_for_whole_texts(evaluate, original, long_llama):
    found = ours(evaluate, "wikitext", "arc_easy")
    for task, size in (("wikitext", 1), ("arc_easy", 8)):
        assert found[task] == metrics_of(original(long_llama, task, batch_size=size), task)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # lm-eval does
def test_quantized_model_scores_as_in_lm_eval(evaluate, original, long_checkpoint):
    tasks = ("wikitext", "lambada_openai")
    found = ours(evaluate, *tasks, model=long_checkpoint, batch_size=2)
    for task in tasks:
        results = original(long_checkpoint, task, batch_size=2)
        assert found[task] == metrics_of(results, task)


def test_limit_takes_the_items_that_lm_eval_takes(evaluate, original, long_llama):
    found = ours(evaluate, "lambada_openai", limit=3, batch_size=2)
    results = original(long_llama, "lambada_openai", limit=3, batch_size=2)
    assert found["lambada_openai"] == metrics_of(results, "lambada_openai")


def test_items_are_the_samples_of_lm_eval(evaluate, original, long_llama):
    (task,) = evaluate("wikitext", batch_size=2).model.tasks
    samples = original(long_llama, "wikitext", batch_size=2)["samples"]["wikitext"]
    for score in task.scores:
        expected = [tuple(map(float, s[score.metric])) for s in samples]
        assert list(score.items) == expected


def test_standard_errors_of_means_are_those_of_lm_eval(evaluate):
    """lm-eval's own needs no bootstrap for a mean."""
    from lm_eval.api.metrics import mean_stderr

    (task,) = evaluate("arc_easy").model.tasks
    for score in task.scores:
        assert score.standard_error == pytest.approx(mean_stderr(list(score.items)))
