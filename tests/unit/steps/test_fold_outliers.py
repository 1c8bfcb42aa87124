"""An OPT with channels a hundred times as loud as the others, in 4 bits with 8-bit activations."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from qtool import pipeline
from qtool.data.calibration import CalibrationSet
from qtool.modeling.locate import Location
from qtool.runtime.modules import QuantizedLinear
from qtool.scheme import ActivationScheme
from tests import families
from tests.helpers import recipe

LOUD, TIMES = [5, 23, 40, 58], 100.0
SAMPLES = torch.randint(3, 96, (12, 48), generator=torch.Generator().manual_seed(1))


def loudly(linears, norm) -> None:
    """Scale outputs of a norm, and what reads them back: the function stays."""
    norm.weight[LOUD] *= TIMES
    norm.bias[LOUD] *= TIMES
    for linear in linears:
        linear.weight[:, LOUD] /= TIMES


@torch.no_grad()
def saved(directory, *, loud: bool):
    model = families.build("opt").float()
    for block in model.model.decoder.layers:
        attention = block.self_attn
        queries = (attention.q_proj, attention.k_proj, attention.v_proj)
        for linear in (*queries, block.fc1):  # initial weights are too small to matter
            linear.weight *= 8
        if loud:
            loudly(queries, block.self_attn_layer_norm)
            loudly([block.fc1], block.final_layer_norm)
    model.save_pretrained(directory)
    families.save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return two models of one function, with loud channels and without."""
    folder = tmp_path_factory.mktemp("outliers")
    return {loud: saved(folder / str(loud), loud=loud) for loud in (True, False)}


@torch.inference_mode()
def logits(directory, *, eight_bits: bool = False):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    blocks = model.model.decoder.layers
    linears = [part for part in blocks.modules() if isinstance(part, QuantizedLinear)]
    for linear in linears:
        linear.entry = replace(linear.entry, activation=ActivationScheme() if eight_bits else None)
    return model(SAMPLES[-4:], use_cache=False).logits


@pytest.fixture(scope="module")
def errors(models, tmp_path_factory):
    """Return how far logits are from the original's, relative to their spread, by fold."""
    expected = logits(models[True])
    torch.testing.assert_close(logits(models[False]), expected, rtol=1e-3, atol=1e-4)
    spread = (expected - expected.mean((0, 1))).norm()
    samples = CalibrationSet(tuple(SAMPLES[:8]), {})

    def error(name: str | None, *, loud: bool = True) -> float:
        out_dir = tmp_path_factory.mktemp("out") / "model"
        fold: dict[str, Any] = {} if name is None else {"fold": {"name": name}}
        chosen = recipe(calibration={}, activations={"granularity": "token"}, **fold)
        pipeline.quantize(Location(models[loud]), out_dir, chosen, samples=samples)
        return float((logits(out_dir, eight_bits=True) - expected).norm() / spread)

    found = {name: error(name) for name in ("aqas", "awq", "smoothquant")}
    return {**found, "none": error(None), "without loud channels": error(None, loud=False)}


def test_fails_without_a_fold_and_survives_with_aqas(errors):
    calm = errors["without loud channels"]
    assert errors["none"] > 2.5 * calm
    assert errors["aqas"] < 1.2 * calm


def test_aqas_is_as_good_as_its_limits(errors):
    assert errors["aqas"] < 1.1 * min(errors["awq"], errors["smoothquant"])
