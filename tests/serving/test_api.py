"""OpenAI's own client against the server."""

from typing import Any

import pytest
import torch

from tests.serving.load import cases
from tests.serving.test_text import byte_level

openai = pytest.importorskip("openai", reason="the extra `dev` isn't installed")
MODEL = "tiny-chat"
CHAT = [{"role": "user", "content": "w3 w4 w5"}]


@pytest.fixture(scope="module")
def known(loaded):
    return cases(loaded.model, loaded.tokenizer, 8)


def ask(client, case, **more):
    body = {**case.body, "model": MODEL, **more}
    if "messages" in body:
        return client.chat.completions.create(**body)
    return client.completions.create(**body)


def text_of(choice):
    if hasattr(choice, "message"):
        return choice.message.content
    delta = getattr(choice, "delta", None)
    return choice.text if delta is None else delta.content or ""


def connected(running):
    return openai.OpenAI(base_url=running.url, api_key="x", max_retries=0)


def test_models(client):
    (model,) = client.models.list()
    assert model.id == client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="'other' isn't served here"):
        client.models.retrieve("other")


def test_answers_are_those_of_generate(client, known):
    for case in known:
        answer = ask(client, case)
        (choice,) = answer.choices
        assert text_of(choice) == case.expected
        assert answer.model == MODEL
        assert choice.finish_reason in ("stop", "length")
        usage = answer.usage
        assert 1 <= usage.completion_tokens <= case.body["max_tokens"]
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_streams_are_those_of_generate(client, known):
    for case in known:
        chunks = list(ask(client, case, stream=True, stream_options={"include_usage": True}))
        *parts, last = chunks
        assert (
            "".join(text_of(choice) for part in parts for choice in part.choices) == case.expected
        )
        assert last.choices == []
        assert last.usage == ask(client, case).usage
        finishes = [part.choices[0].finish_reason for part in parts]
        assert finishes[-1] == ask(client, case).choices[0].finish_reason
        assert set(finishes[:-1]) <= {None}
        assert len({chunk.id for chunk in chunks}) == 1


def test_several_answers_and_prompts_keep_their_order(client):
    answer = client.completions.create(
        model=MODEL, prompt=["w3 w4", "w7"], n=3, seed=5, max_tokens=6, temperature=1.2
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts[:3])) > 1
    again = client.completions.create(
        model=MODEL, prompt=["w3 w4", "w7"], n=3, seed=5, max_tokens=6, temperature=1.2, stream=True
    )
    streamed = [""] * 6
    for chunk in again:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts
    assert answer.usage.completion_tokens == 36


def test_prompts_of_tokens(client, loaded):
    words = "w3 w9 w12"
    ids = loaded.tokenizer(words).input_ids
    for prompt in (ids, [ids]):
        by_ids = client.completions.create(model=MODEL, prompt=prompt, max_tokens=5, temperature=0)
        by_text = client.completions.create(model=MODEL, prompt=words, max_tokens=5, temperature=0)
        assert by_ids.choices[0].text == by_text.choices[0].text
    with pytest.raises(openai.BadRequestError, match="token 96; the model has 96"):
        client.completions.create(model=MODEL, prompt=[96])


def test_stop_ends_before_the_text(client):
    plain = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=20, temperature=0
    ).choices[0]
    words = plain.message.content.split()
    stop = words[3]
    kept = plain.message.content[: plain.message.content.find(stop)]
    for stream in (False, True):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=CHAT,
            max_tokens=20,
            temperature=0,
            stop=[stop, "no"],
            stream=stream,
        )
        choices = [c for a in (answer if stream else [answer]) for c in a.choices]
        assert "".join(map(text_of, choices)) == kept
        assert choices[-1].finish_reason == "stop"


def test_logprobs_of_a_chat(client, loaded):
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    (choice,) = answer.choices
    content = choice.logprobs.content
    assert " ".join(one.token for one in content) == choice.message.content
    text = loaded.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = loaded.tokenizer(text, add_special_tokens=False).input_ids
    ids += loaded.tokenizer.convert_tokens_to_ids([one.token for one in content])
    with torch.no_grad():
        rows = loaded.model(torch.tensor([ids])).logits[0, -6:-1].log_softmax(-1)
    for one, row in zip(content, rows, strict=True):
        assert one.logprob == pytest.approx(float(row.max()), abs=1e-4)
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].token == one.token
        assert bytes(one.bytes).decode() == one.token


def test_logprobs_of_a_completion(client):
    for stream in (False, True):
        answer = client.completions.create(
            model=MODEL, prompt="w3", max_tokens=4, temperature=0, logprobs=2, stream=stream
        )
        choices = [c for a in (answer if stream else [answer]) for c in a.choices]
        tokens = [token for c in choices for token in c.logprobs.tokens]
        offsets = [offset for c in choices for offset in c.logprobs.text_offset]
        text = "".join(c.text for c in choices)
        assert text == "".join(f" {token}" for token in tokens)
        assert offsets == [0, *(sum(len(t) + 1 for t in tokens[:n]) for n in (1, 2, 3))]
        assert all(len(top) == 2 for c in choices for top in c.logprobs.top_logprobs)
    answer = client.completions.create(
        model=MODEL, prompt="w3", max_tokens=2, temperature=0, logprobs=0
    )
    assert answer.choices[0].logprobs.top_logprobs == [{}, {}]
    assert len(answer.choices[0].logprobs.token_logprobs) == 2


WRONG: dict[str, tuple[dict[str, Any], str | None]] = {
    "temperature": ({"temperature": 3}, "temperature"),
    "penalty": ({"presence_penalty": 0.5}, "presence_penalty"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "format": ({"response_format": {"type": "json_object"}}, "response_format.type"),
    "unknown": ({"extra_body": {"best": 3}}, "best"),
    "length": ({"max_tokens": 5000}, "messages"),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "messages",
    ),
    "logprobs": ({"top_logprobs": 3}, None),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_known_is_refused(client, name):
    change, param = WRONG[name]
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{"model": MODEL, "messages": CHAT} | change)
    assert (error.value.param or "").startswith(param or "")
    assert error.value.type == "invalid_request_error"
    assert error.value.body["message"]


def test_parts_of_text_and_other_roles_are_taken(client):
    messages = [
        {"role": "developer", "content": "w8"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "w3"}, {"type": "text", "text": " w4"}],
        },
        {"role": "assistant", "content": "w5", "name": "x"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2)
    assert answer.usage.prompt_tokens == 4 + 2 * 3
    assert answer.choices[0].message.role == "assistant"


def test_an_answer_takes_all_the_room_there_is(client):
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0)
    assert answer.usage.total_tokens == 256 or answer.choices[0].finish_reason == "stop"


def test_a_model_without_a_template(serve, checkpoint):
    from qtool.modeling.load import load_tokenizer

    with serve(tokenizer=load_tokenizer(checkpoint)) as running, connected(running) as client:
        with pytest.raises(openai.BadRequestError, match="has no chat template") as error:
            client.chat.completions.create(model=MODEL, messages=CHAT)
        assert error.value.code == "no_chat_template"
        assert client.completions.create(model=MODEL, prompt="w3").choices


def test_a_stream_of_broken_characters_is_the_whole(serve):
    """The model's 96 tokens are bytes from 0xA0 on: characters, parts of them, and no such."""
    with serve(tokenizer=byte_level(0xA0)) as running, connected(running) as client:
        body = {"model": MODEL, "prompt": [9, 20], "max_tokens": 60, "seed": 3}
        whole = client.completions.create(**body).choices[0].text
        chunks = [c.choices[0].text for c in client.completions.create(**body, stream=True)]
    assert "".join(chunks) == whole
    assert any("\x7f" < char != "\ufffd" for char in whole)
    assert len(chunks) > 1
