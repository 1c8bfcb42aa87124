"""Nothing silent: what isn't quantized is said wherever a result is shown, with the reason."""

import json

import pytest

from qtool.checkpoint.kept_kinds import kept_kinds
from qtool.checkpoint.reader import CheckpointReader
from tests import families, mixtures
from tests.cli.conftest import Cli

pytest.importorskip("transformers", minversion="5.0")


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_every_weight_that_stays_is_listed_with_its_reason(cli: Cli, tmp_path):
    mixtures.build("mixtral").save_pretrained(tmp_path / "model")
    families.save_tokenizer(tmp_path / "model")
    override = '{match: "*.v_proj", skip: true}'
    options = ["--method", "rtn", "--set", f"weights.overrides=[{override}]"]
    done = cli("quantize", *options, tmp_path / "model", tmp_path / "out")
    assert done.code == 0, done.err
    reader = CheckpointReader(tmp_path / "out")
    listed = reader.manifest.unquantized
    matrices = {
        name
        for name in reader.names()
        if name not in reader.manifest.layers and len(reader.spec(name).shape) > 1
    }
    assert matrices == set(listed)
    kinds = kept_kinds(listed)
    assert {one.kind.rpartition(".")[2] for one in kinds} >= {"v_proj", "gate", "embed_tokens"}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for shown in (done.out, cli("inspect", tmp_path / "out").out, card):
        text = words(shown)
        for one in kinds:
            assert one.kind in text, one
            assert one.why in text, one
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["unquantized"] == dict(listed)
    again = json.loads(
        cli(
            "quantize", *options, "--resume", "--json", "-", tmp_path / "model", tmp_path / "out"
        ).out
    )
    assert again["unquantized"] == dict(listed)
