"""Mixtures through the commands: what is drawn, told, refused and reported."""

import json
import shutil
from typing import Any

import pytest

from qtool.modeling.load import load_tokenizer
from tests.families import text
from tests.helpers import steps_in

TEMPLATE = "{% for m in messages %}<s> {{ m.content }} </s> {% endfor %}"
CHAT = [{"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w12"}]
FEW = ("--set", "calibration.num_samples=24", "--set", "calibration.sequence_length=16")


@pytest.fixture
def chat_model(llama, tmp_path):
    """Return the tiny model with a chat template."""
    shutil.copytree(llama, tmp_path / "chatty")
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chatty")
    return tmp_path / "chatty"


def mixture(tmp_path, **keys):
    """Write two sources, and return the option that mixes them."""
    rows = [{"messages": CHAT} for _ in range(9)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "words.txt").write_text("\n\n".join(text(30, n) for n in range(30)))
    sources = [
        {"dataset": str(tmp_path / "words.txt"), "share": 0.75},
        {"dataset": str(tmp_path / "chats.jsonl"), "share": 0.25, **keys},
    ]
    return ("--set", f"calibration.mixture={json.dumps(sources)}")


def test_default_mixture_is_drawn_and_says_which_special_tokens_it_has(cli, chat_model, tmp_path):
    done = cli("calibrate", *FEW, "--json", tmp_path / "r.json", chat_model, tmp_path / "cal")
    assert done.code == 0
    assert "Warning" not in done.err
    counts = json.loads((tmp_path / "r.json").read_text())["special_tokens"]
    assert counts["<s>"] > 4
    assert counts["</s>"] > 4
    assert f"special tokens in the samples: <s> {counts['<s>']}, </s> {counts['</s>']}" in done.err
    about = json.loads((tmp_path / "cal" / "calibration.json").read_text())
    assert about["special tokens"] == counts
    assert [one["dataset"] for one in about["sources"]][1:] == [
        *("prose", "dialogues", "gsm8k-train", "source-code", "languages")
    ]
    assert sum(one["samples"] for one in about["sources"]) == 24


def test_quantize_ends_with_a_comparison_on_text_and_chats(cli, chat_model, tmp_path):
    run = ("quantize", "--method", "gptq", *FEW, "--json")
    done = cli(*run, tmp_path / "r.json", chat_model, tmp_path / "out")
    assert done.code == 0, done.err
    check = json.loads((tmp_path / "r.json").read_text())["check"]
    for what in ("text", "chats"):
        divergence, share = (check[what][name] for name in ("kl_divergence", "top1_agreement"))
        row = " ".join(
            next(
                line for line in done.out.splitlines() if f"KL divergence on {what}" in line
            ).split()
        )
        assert f"{divergence:.4f} nats per token; same likeliest token {100 * share:.1f} %" in row
    assert "is complete, but" not in done.err
    again = cli(*run, "-", "--no-check", chat_model, tmp_path / "other")
    assert json.loads(again.out)["check"] is None
    assert (
        "KL divergence"
        not in cli(*run[:-1], "--no-check", "--overwrite", chat_model, tmp_path / "other").out
    )


def test_quantize_says_that_a_model_without_template_has_no_chats(cli, llama, tmp_path):
    done = cli("quantize", "--method", "gptq", *FEW, llama, tmp_path / "out")
    assert done.code == 0, done.err
    assert "has no chat template" in " ".join(done.out.split())


def test_text_without_the_tokens_of_a_chat_model_is_warned_of(cli, chat_model, tmp_path):
    done = cli("calibrate", *FEW, "--dataset", "wikitext2-valid", chat_model, tmp_path / "cal")
    assert done.code == 0
    assert "No sample of wikitext2-valid has <s> or </s>, which prompts of this" in done.err
    run = ("quantize", "--method", "gptq", "--calibration", tmp_path / "cal", chat_model)
    assert "No sample of wikitext2-valid has <s> or </s>" in cli(*run, tmp_path / "out").err
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["calibration"]["special tokens missing"] == ["<s>", "</s>"]


def test_own_files_are_mixed_and_the_report_has_them(cli, chat_model, tmp_path):
    run = ("quantize", "--method", "gptq", *FEW, *mixture(tmp_path, **{"as": "chat"}))
    done = cli(*run, chat_model, tmp_path / "out")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())["calibration"]
    assert report["dataset"] == "a mixture of words.txt, chats.jsonl"
    assert [(one["samples"], one["chats"] > 0) for one in report["sources"]] == [
        *((18, False), (6, True))
    ]
    assert report["special tokens missing"] == []
    recipe = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert [one.get("as") for one in recipe["recipe"]["calibration"]["mixture"]] == [None, "chat"]


def test_directory_of_a_mixture_gives_the_same_bytes_as_drawing_inline(cli, llama, tmp_path):
    options = (*FEW, *mixture(tmp_path))
    run = ("quantize", "--method", "gptq")
    assert cli("calibrate", *options, llama, tmp_path / "cal").code == 0
    assert cli(*run, *options, llama, tmp_path / "one").code == 0
    given = ("--calibration", tmp_path / "cal")
    assert cli(*run, *options, *given, llama, tmp_path / "two").code == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_matched_lengths_are_drawn_from_a_mixture(cli, llama, tmp_path):
    (tmp_path / "lengths.txt").write_text("10 30")
    matched = ("--lengths", tmp_path / "lengths.txt", "--set", "calibration.num_tokens=800")
    done = cli("calibrate", *matched, *mixture(tmp_path), "--json", "-", llama, tmp_path / "cal")
    assert done.code == 0
    assert set(json.loads(done.out)["lengths"]) == {10, 30}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"as": "chat"}, "is a chat, but the model's tokenizer has no chat template"),
        ({"share": 0.5}, "the shares must add up to 1, and add up to 1.25"),
        ({"dataset": "prosa"}, "No 'prosa' in bundled texts. Did you mean 'prose'?"),
        ({"dataset": "nowhere.jsonl"}, "No file nowhere.jsonl"),
    ],
)
def test_impossible_mixture_is_one_line(cli, llama, tmp_path, keys, words):
    done = cli("calibrate", *FEW, *mixture(tmp_path, **keys), llama, tmp_path / "cal")
    assert done.code == 1
    assert words in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "cal").exists()


def test_few_samples_for_many_sources_and_a_short_source_are_warned_of(cli, llama, tmp_path):
    few = ("--set", "calibration.num_samples=4", "--set", "calibration.sequence_length=16")
    done = cli("calibrate", *few, *mixture(tmp_path), llama, tmp_path / "cal")
    assert "4 samples are few for a mixture of 2 sources: none can be held out of chats" in done.err
    long = ("--set", "calibration.num_samples=40", "--set", "calibration.sequence_length=64")
    done = cli("calibrate", *long, *mixture(tmp_path), llama, tmp_path / "long")
    assert "chats.jsonl is too short for 640 tokens: its documents were used" in done.err


def test_what_goes_on_is_told_once(llama, tmp_path):
    from qtool import pipeline
    from qtool.modeling.locate import Location
    from qtool.recipe.calibration import CalibrationSection

    events: list[Any] = []
    section = CalibrationSection(dataset="wikitext2-valid", num_samples=4, sequence_length=16)
    pipeline.calibrate(Location(llama), tmp_path / "cal", section, emit=events.append)
    assert len(steps_in(events, "special tokens in the samples: <s> 0, </s> 0")) == 1
