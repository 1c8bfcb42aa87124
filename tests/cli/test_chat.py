"""`qtool chat`: lines of a pipe, what is remembered, Ctrl-C, and what is refused."""

import io
import re
import signal

import pytest
import torch

from qtool import pipeline
from qtool.errors import ModelError
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.serving.decoders import ForwardDecoder
from qtool.serving.tokens import SamplingOptions
from tests.cli.conftest import Cli
from tests.helpers import recipe

SPEED = re.compile(r"\[(\d+) tokens, \d+\.\d tokens/s, the first after \d+\.\d\d s\]")


@pytest.fixture(scope="module")
def talking(chat_llama, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("talking") / "tiny"
    pipeline.quantize(Location(chat_llama), out_dir, recipe())
    return out_dir


@pytest.fixture(scope="module")
def by_generate(talking):
    """Return what `generate` answers to messages."""
    loaded = load_model(Location(talking), device="cpu")

    def answer(*messages: str, most: int) -> str:
        text = "".join(f"<s> {message} </s> " for message in messages)
        ids = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            tokens = loaded.model.generate(ids, max_new_tokens=most, do_sample=False)
        return loaded.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)

    return answer


@pytest.fixture
def talk(cli: Cli, talking, monkeypatch):
    def run(text: str, *options: str):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return cli("chat", str(talking), "--temperature", "0", *options)

    return run


def test_answers_are_those_of_generate_and_are_remembered(talk, by_generate):
    done = talk("w3 w4\nw5\n\n/reset\nw5\n/what\n/quit\nw6\n", "--max-tokens", "7")
    first = by_generate("w3 w4", most=7)
    second = by_generate("w3 w4", first, "w5", most=7)
    assert done.code == 0
    assert done.out.splitlines() == [first, second, by_generate("w5", most=7)]
    assert [line[:10] for line in done.said if SPEED.fullmatch(line)] == ["[7 tokens,"] * 3
    assert sum("/reset forgets" in line for line in done.said) == 1


def test_a_system_prompt_comes_first_and_stays(talk, by_generate):
    done = talk("w5\n/reset\nw5\n", "--system", "w9", "--max-tokens", "5")
    assert done.out.splitlines() == [by_generate("w9", "w5", most=5)] * 2


def test_a_seed_gives_the_same_conversation(talk):
    options = ("--max-tokens", "9", "--seed", "3", "--temperature", "1.5")
    runs = [talk("w5\nw6\n", *options[:4]) for _ in range(2)]
    assert runs[0].out == runs[1].out


def test_a_conversation_that_is_too_long_can_be_reset(talk, by_generate):
    done = talk("w5\nw6\n/reset\nw5\n", "--max-model-len", "24")
    assert done.code == 0
    first, again = done.out.splitlines()
    assert first == again == by_generate("w5", most=24 - 3)
    assert sum("/reset begins a new one" in line for line in done.said) == 1


@pytest.fixture
def python_interrupt():
    """Give the test Python's own handler: what a shell starts in the background has none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_the_answer_and_nothing_else(
    talk, by_generate, monkeypatch, python_interrupt
):
    step, count = ForwardDecoder.step, iter(range(1000))

    def interrupted(self, tokens):
        if next(count) == 4:
            signal.raise_signal(signal.SIGINT)
        return step(self, tokens)

    monkeypatch.setenv("QTOOL_RUNNER", "0")
    monkeypatch.setattr(ForwardDecoder, "step", interrupted)
    done = talk("w5\n/reset\nw5\n", "--max-tokens", "12")
    assert done.code == 0
    part, whole = done.out.splitlines()
    assert whole == by_generate("w5", most=12)
    assert whole.startswith(part)
    assert len(part.split()) == 6
    assert signal.getsignal(signal.SIGINT) is python_interrupt


def test_a_model_without_a_template_is_refused(cli: Cli, checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    done = cli("chat", str(checkpoint))
    assert done.code == 1
    assert "has no chat template" in done.err


def test_what_was_stopped_is_remembered_as_far_as_it_was_written(talking):
    options = pipeline.ChatOptions(sampling=SamplingOptions(temperature=0), max_tokens=10)
    with pipeline.chat(Location(talking), options) as conversation:
        pieces = []
        for piece in conversation.answer("w5"):
            pieces.append(piece)
            if len(pieces) == 3:
                conversation.stop()
        assert conversation.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
        assert conversation.speed is not None
        assert conversation.speed.tokens == 3
        for _ in conversation.answer("w6"):
            break
        assert list(conversation.answer("w7"))
        with pytest.raises(ModelError, match="/reset begins a new one"):
            list(conversation.answer("w3 " * 600))


def test_what_another_program_has_quantized_is_imported_first(
    cli: Cli, talking, tmp_path, monkeypatch
):
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    pipeline.export(talking, tmp_path / "theirs", "gptq")
    said = []
    for model in (talking, tmp_path / "theirs"):
        monkeypatch.setattr("sys.stdin", io.StringIO("w3 w4\n"))
        done = cli("chat", str(model), "--temperature", "0", "--max-tokens", "4")
        assert done.code == 0, done.err
        said.append(done.out)
    assert said[0] == said[1]
