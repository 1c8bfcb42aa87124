"""A program that has never heard of qtool: it uses a checkpoint as it would use any other model.

    python tests/found/uses.py ORIGINAL CHECKPOINT FOLDER USE...

Prints one line of JSON: by name of a use an empty text, or a traceback. Nothing here imports qtool,
nor anything of the tests that does.
"""

import copy
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

ORIGINAL, CHECKPOINT, FOLDER = map(Path, sys.argv[1:4])
PROMPT = torch.arange(3, 23).unsqueeze(0)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def load(directory: Path = CHECKPOINT, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """Return a model that is quantized, in float32 unless another dtype is asked for."""
    model = kind.from_pretrained(directory, **{"dtype": torch.float32, **options})
    assert any(type(part).__name__ == "QuantizedLinear" for part in model.modules())
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return the logits of the prompt."""
    answer: Tensor = model(PROMPT, use_cache=False).logits
    return answer


@torch.no_grad()
def generated(model: Any, **options: Any) -> Tensor:
    """Return the prompt and what greedy search appends."""
    tokens: Tensor = model.generate(PROMPT, **{**GREEDY, **options})
    return tokens


def use_model() -> None:
    """The weights are those of the original, but for rounding to 4 bits."""
    original = AutoModelForCausalLM.from_pretrained(ORIGINAL, dtype=torch.float32).eval()
    expected = logits(original)
    assert (logits(load()) - expected).norm() < 0.3 * expected.norm()


def use_auto_model() -> None:
    """The body of the model, without a head."""
    with torch.no_grad():
        expected = load().model(PROMPT).last_hidden_state
        assert torch.equal(load(kind=AutoModel)(PROMPT).last_hidden_state, expected)


def use_dtype() -> None:
    """Activations have the dtype that is asked for; "auto" is the checkpoint's."""
    expected = logits(load())
    for dtype, found in ((torch.bfloat16, torch.bfloat16), ("auto", torch.float16)):
        model = load(dtype=dtype)
        assert model.dtype == logits(model).dtype == found
        assert (logits(model) - expected).norm() < 0.05 * expected.norm()


def use_device_map() -> None:
    """Accelerate says where the parts are."""
    expected = logits(load())
    for device_map in ("auto", "cpu", {"": "cpu"}):
        assert torch.equal(logits(load(device_map=device_map)), expected)


def use_pipeline() -> None:
    """Text by name of the directory, and features."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    text = tokenizer.decode(PROMPT[0])
    write = pipeline("text-generation", str(CHECKPOINT), dtype=torch.float32)
    (answer,) = write(text, return_tensors=True, **GREEDY)
    assert answer["generated_token_ids"][-6:] == generated(load())[0, -6:].tolist()
    features = pipeline("feature-extraction", str(CHECKPOINT), dtype=torch.float32)(text)
    assert torch.tensor(features).shape[-1] == load().config.hidden_size


def use_save_pretrained() -> None:
    """What is saved again is the same checkpoint."""
    for dtype in (torch.float32, torch.bfloat16):
        model = load(dtype=dtype)
        model.save_pretrained(FOLDER / "saved")
        assert torch.equal(logits(load(FOLDER / "saved", dtype=dtype)), logits(model))


def use_push_to_hub() -> None:
    """What a hub would be sent is the same checkpoint."""
    from transformers.utils import hub

    folder, model = FOLDER / "pushed", load()
    folder.mkdir()

    def create_commit(*_args: Any, operations: Any, **_options: Any) -> None:
        for operation in operations:
            copied = Path(operation.path_or_fileobj).read_bytes()
            (folder / operation.path_in_repo).write_bytes(copied)

    repository, card = mock.Mock(return_value=mock.Mock(repo_id="somebody/model")), mock.Mock()
    place: Any = hub if hasattr(hub, "create_repo") else hub.HfApi  # transformers 4, 5
    with (
        mock.patch.object(place, "create_repo", repository),
        mock.patch.object(place, "create_commit", create_commit),
        mock.patch.object(hub, "create_and_tag_model_card", card),
    ):
        model.push_to_hub("somebody/model")
    assert torch.equal(logits(load(folder)), logits(model))


def use_assistant() -> None:
    """Drafts change nothing: of another model, quantized or not, and of the prompt."""
    model, original = load(), AutoModelForCausalLM.from_pretrained(ORIGINAL, dtype=torch.float32)
    expected = generated(model)
    for options in (
        {"assistant_model": load()},
        {"assistant_model": original.eval()},
        {"prompt_lookup_num_tokens": 2},
    ):
        assert torch.equal(generated(model, **options), expected)
    assert torch.equal(generated(original, assistant_model=model), generated(original))


def use_compile() -> None:
    """A compiled model has the same logits, and so has one that learns."""
    model = load()
    expected = logits(load())
    error = (logits(torch.compile(model, fullgraph=True)) - expected).norm() / expected.norm()
    assert error < 1e-3, error  # tables are of rounded inputs, summed otherwise
    os.environ["QTOOL_BACKEND"] = "dense"
    torch.compiler.reset()
    try:
        torch.testing.assert_close(
            logits(torch.compile(load(), fullgraph=True)), logits(load()), rtol=1e-4, atol=1e-5
        )
    finally:
        del os.environ["QTOOL_BACKEND"]


def use_trainer_evaluate() -> None:
    """The loss of a data set."""
    model, labels = load(), PROMPT.clone()
    labels[0, 0] = -100  # transformers 4 counts it, although nothing says it
    rows = [{"input_ids": PROMPT[0], "labels": labels[0]} for _ in range(3)]
    with torch.no_grad():
        expected = float(model(PROMPT, labels=labels).loss)
    trainer = transformers.Trainer(model, training(1), eval_dataset=rows)
    assert abs(trainer.evaluate()["eval_loss"] - expected) < 1e-4


def training(steps: int) -> Any:
    """Return arguments of a trainer that reports nothing."""
    return transformers.TrainingArguments(
        str(FOLDER / "trained"),
        max_steps=steps,
        learning_rate=0.1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )


def use_lora() -> None:
    """Adapters below other layers learn through them; trained, saved, loaded, taken off."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model, rows = load(), [{"input_ids": PROMPT[0], "labels": PROMPT[0]} for _ in range(64)]
    before = logits(model)  # what is made ready here was made where nothing learns
    options: dict[str, Any] = {"r": 4, "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", **options))
    assert torch.equal(logits(adapted), before)
    first = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert set(adapted.peft_config["default"].target_modules) >= {
        f"model.layers.{block}.mlp.{part}" for block in (0, 1) for part in ("down_proj", "up_proj")
    }
    transformers.Trainer(adapted, training(4), train_dataset=rows).train()
    assert float(first.lora_B["default"].weight.detach().norm()) > 0
    trained = logits(adapted.eval())
    assert not torch.allclose(trained, before, atol=1e-2)
    adapted.save_pretrained(FOLDER / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(), FOLDER / "adapter")), trained)
    try:
        copy.deepcopy(adapted).merge_and_unload()
    except Exception as error:  # noqa: BLE001
        assert "can't take up an adapter" in str(error)
    else:
        raise AssertionError("merged without a word")
    assert torch.equal(logits(adapted.unload()), before)


USES: dict[str, Callable[[], None]] = {
    name.removeprefix("use_"): function
    for name, function in list(globals().items())
    if name.startswith("use_")
}


def outcome(use: Callable[[], None]) -> str:
    """Return nothing, or a traceback."""
    try:
        use()
    except Exception:  # noqa: BLE001
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    outcomes = {name: outcome(USES[name]) for name in sys.argv[4:]}
    sys.stdout.write(f"{json.dumps(outcomes)}\n")
