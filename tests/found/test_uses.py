"""Checkpoints load in programs that never import qtool, as any other model does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT

PROGRAM = Path(__file__).with_name("uses.py")
USES = [
    *("model", "auto_model", "dtype", "device_map", "pipeline", "save_pretrained"),
    *("push_to_hub", "assistant", "compile", "trainer_evaluate", "lora"),
]
TASK = """
task: invented
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: perplexity, aggregation: perplexity}}]
"""

pytestmark = pytest.mark.versions


def run(*command: object) -> str:
    """Run a program of others and return its stdout."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,  # no folder `qtool` is found there by chance
        timeout=300,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def outcomes(llama, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uses")
    return json.loads(run(PROGRAM, llama, checkpoint, folder, *USES).splitlines()[-1])


def test_the_program_knows_nothing_of_qtool():
    code = PROGRAM.read_text()
    assert not any(
        line.strip().startswith(("import qtool", "from qtool", "from tests", "import tests"))
        for line in code.splitlines()
    )
    assert [f"def use_{name}(" in code for name in USES] == [True] * code.count("def use_")


@pytest.mark.parametrize("use", USES)
def test_checkpoint_is_used_as_any_model(outcomes, use):
    assert outcomes[use] == ""


def test_plain_lm_eval_scores_a_checkpoint(checkpoint, tmp_path):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    row = {"question": "w3 w4 w5", "answer": " w9 w7"}
    tokens = tokenizer(row["question"] + row["answer"], return_tensors="pt").input_ids
    with torch.no_grad():
        chances = model(tokens).logits[0].log_softmax(-1)
    expected = -sum(float(chances[at - 1, tokens[0, at]]) for at in (-2, -1))

    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "invented.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    run(
        *("-m", "lm_eval", "--model", "hf", "--tasks", "invented", "--include_path", tmp_path),
        *("--model_args", f"pretrained={checkpoint},dtype=float32", "--device", "cpu"),
        *("--output_path", tmp_path / "out"),
    )
    (scores,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(scores.read_text())["results"]["invented"]["perplexity,none"]
    assert abs(torch.tensor(found).log().item() - expected) < 1e-3
