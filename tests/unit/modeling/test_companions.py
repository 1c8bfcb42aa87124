"""Which files come along: what transformers reads, and the licence; nothing from elsewhere."""

import json
import os
import shutil
from codecs import BOM_UTF8
from pathlib import Path

import pytest

from qtool import pipeline
from qtool.errors import ModelError
from qtool.modeling.companions import read_companions
from qtool.modeling.load import load_tokenizer
from qtool.modeling.locate import Location
from tests.helpers import recipe


@pytest.fixture
def copy(llama, tmp_path):
    return Path(shutil.copytree(llama, tmp_path / "copy"))


COPIED = (
    *("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "qwen.tiktoken"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "tekken.json"),
    "additional_chat_templates/tool_use.jinja",
)
LEFT = (
    *("adapter_config.json", "trainer_state.json", "training_args.bin", "optimizer.pt", "run.log"),
    *("all_results.json", "train_results.json", "eval_results.json", "quantization_report.json"),
    *("model.safetensors.index.json", "scheduler.pt", "README.md", "modeling_own.py", "notes.txt"),
    *("config.json", "additional_chat_templates/notes.md", "checkpoint-5/tokenizer.json"),
)


def test_what_belongs_to_the_model_is_copied_and_nothing_else(copy):
    for name in (*COPIED, *LEFT):
        path = copy / name
        if name not in ("config.json", "model.safetensors.index.json"):
            path.parent.mkdir(exist_ok=True)
            path.write_text("{}" if name.endswith(".json") else "text")
    found = read_companions(copy)
    assert {*COPIED} <= {*found}
    assert not {*LEFT} & {*found}
    assert found["LICENSE"] == b"text"


def test_half_of_a_surrogate_pair_stays_when_code_is_removed(copy):
    values = {"odd": "\ud83d", "even": "\u00e9"}
    (copy / "added_tokens.json").write_text(json.dumps({**values, "auto_map": {}}))
    assert json.loads(read_companions(copy)["added_tokens.json"]) == values


def test_what_is_no_regular_file_is_left_out(copy):
    os.mkfifo(copy / "vocab.json")
    (copy / "merges.txt").mkdir()
    (copy / "tekken.json").symlink_to("tekken.json")
    (copy / "added_tokens.json").symlink_to(copy / "nowhere")
    assert not {"vocab.json", "merges.txt", "tekken.json", "added_tokens.json"} & {
        *read_companions(copy)
    }


def test_links_that_leave_the_directory_are_left_out_with_a_warning(copy, tmp_path, caplog):
    (tmp_path / "private.txt").write_text("secret")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "own.jinja").write_text("secret")
    (copy / "vocab.txt").symlink_to(tmp_path / "private.txt")
    (copy / "merges.txt").symlink_to("../private.txt")
    (copy / "additional_chat_templates").symlink_to(tmp_path / "templates")
    (copy / "LICENSE").symlink_to("tokenizer.json")
    found = read_companions(copy)
    assert b"secret" not in found.values()
    assert found["LICENSE"] == found["tokenizer.json"]
    assert len([r for r in caplog.records if "leaves the model's directory" in r.message]) == 3


def test_snapshot_of_the_hub_is_links_into_its_blobs(copy, tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(copy.iterdir())):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    (snapshot / "LICENSE").symlink_to("../../../copy/config.json")
    assert {*read_companions(snapshot)} == {*read_companions(copy)}
    pipeline.quantize(Location(snapshot), tmp_path / "out", recipe())
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_directory_that_is_a_link_itself_is_no_obstacle(copy, tmp_path):
    (tmp_path / "link").symlink_to(copy)
    assert {*read_companions(tmp_path / "link")} == {*read_companions(copy)}


@pytest.mark.parametrize("content", ['{"auto_map": [', "[" * 10**5 + "auto_map", '["auto_map"]'])
def test_json_that_cannot_be_read_is_copied_as_it_is(copy, content):
    (copy / "vocab.json").write_text(content)
    assert read_companions(copy)["vocab.json"].decode() == content


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1}\xff', b"[" * 10**5])
def test_a_damaged_tokenizer_is_refused_before_anything_is_made_of_the_model(
    copy, tmp_path, name, content
):
    (copy / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name} isn't valid JSON: .*Download it again"):
        pipeline.quantize(Location(copy), tmp_path / "out", recipe())
    assert not (tmp_path / "out").exists()


def test_code_is_removed_and_the_rest_stays(copy):
    values = {"auto_map": {"AutoTokenizer": ["a.B", None]}, "chat": "ä"}
    (copy / "tokenizer_config.json").write_text(json.dumps(values))
    assert json.loads(read_companions(copy)["tokenizer_config.json"]) == {"chat": "ä"}


def test_file_that_cannot_be_read_is_one_line(copy, monkeypatch):
    def denied(_path):
        raise PermissionError(13, "Permission denied", "LICENSE")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ModelError, match="a file beside the weights can't be read"):
        read_companions(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_a_byte_order_mark_in_a_tokenizer_is_refused_before_the_work(copy, name):
    content = (copy / name).read_bytes() if (copy / name).exists() else b"{}"
    (copy / name).write_bytes(BOM_UTF8 + content)
    for read in (read_companions, load_tokenizer):
        with pytest.raises(ModelError, match=f"{name} starts with a byte order mark.*without one"):
            read(copy)


def test_a_byte_order_mark_is_no_part_of_a_chat_template(copy):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (copy / "chat_template.jinja").write_bytes(BOM_UTF8 + template.encode())
    assert load_tokenizer(copy).chat_template == template
    assert read_companions(copy)["chat_template.jinja"] == template.encode()
