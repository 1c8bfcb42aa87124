import json
from dataclasses import asdict, replace

import pytest
import torch

from qtool.errors import BackendError, MissingExtraError, OutputError, UnknownNameError
from qtool.modeling.locate import Location, locate
from qtool.plugins import check_name
from qtool.report.roofline import check_plot, draw_roofline, series
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.selection import KERNELS
from qtool.runtime.decode.torch_ops import TorchOps
from qtool.scheme import WeightScheme
from qtool.timing import decode, gpu, workload
from qtool.timing.decode import EndToEnd
from tests.unit.timing.rig import MACHINE, TINY, FakeClock, bench

CPU = torch.device("cpu")
SCHEME = WeightScheme(num_bits=2, group_size=32)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(decode, "REPEATS", 2)


@pytest.fixture(scope="module")
def result():
    work = workload.synthetic_workload("tiny", replace(TINY, decoder=None), SCHEME, None, CPU)
    return gpu.time_workload(work, bench(), {"qtool": "0"})


def test_tokens_per_second_are_medians_without_the_first_repeat(monkeypatch):
    monkeypatch.setattr(decode, "PROMPT_TOKENS", 6)
    monkeypatch.setattr(decode, "DECODE_TOKENS", 3)
    work = workload.synthetic_workload("tiny", TINY, SCHEME, None, CPU)
    got = decode.time_decoder(work.models[0], TorchOps(), FakeClock())
    assert (got.prefill_tokens_per_second, got.decode_tokens_per_second) == (6.0, 3.0)
    assert (got.prompt_tokens, got.decode_tokens, got.repeats) == (6, 3, decode.REPEATS)
    assert got.peak_memory_bytes == 2 * 10**9  # of three looks, the last less the first
    assert got.name == "tiny, 2 bits"


def test_a_model_that_does_not_run_is_named_and_ends_nothing():
    def refuse():
        raise BackendError("it is\nspread")

    work = workload.Workload("none", (), (EndToEnd("big", refuse),))
    assert gpu.time_workload(work, bench(), {}).not_run["big"] == "it is spread"


def test_a_layer_that_does_not_run_is_named_and_ends_nothing(tmp_path):
    def refuse():
        raise BackendError("too\nlarge")

    work = workload.synthetic_workload("tiny", replace(TINY, decoder=None), SCHEME, None, CPU)
    broken = replace(work.layers[0], load=refuse)
    result = gpu.time_workload(replace(work, layers=(broken, work.layers[1])), bench(), {})
    assert [layer.name for layer in result.layers] == ["o"]
    assert result.not_run["qkv"] == "too large"
    nothing = gpu.time_workload(replace(work, layers=(broken,)), bench(), {})
    draw_roofline(tmp_path / "empty.svg", nothing)


def test_json_has_all_that_was_measured(result):
    value = json.loads(json.dumps(asdict(result)))
    assert value["machine"] == asdict(MACHINE)
    assert value["copy_gb_per_second"] == 1.0
    assert [layer["name"] for layer in value["layers"]] == [
        *("qkv", "o", "gate_up", "down", "lm_head")
    ]
    assert [layer["num_bits"] for layer in value["layers"]] == [2, 2, 2, 2, 4]
    first = value["layers"][0]
    assert set(first["rows"][0]) == {
        *("what", "kernel", "microseconds", "weight_bytes", "gb_per_second"),
        *("gb_per_second_with_activations", "of_copy_bandwidth", "speedup"),
    }
    assert set(first["sweep"][0]) == {
        *("tokens", "kernel", "microseconds", "fp16_microseconds", "speedup")
    }
    assert value["end_to_end"] == []
    assert "one block" in value["not_run"]["end to end"]
    assert value["versions"] == {"qtool": "0"}


def test_peers_are_asked_for_and_missing_ones_named():
    work = workload.Workload("none", (), ())
    few = gpu.time_workload(work, bench(), {}).not_run
    many = gpu.time_workload(work, bench(), {}, with_peers=True).not_run
    assert list(few) == ["tinygemm int4 g128"]
    assert {"torchao int4 g128", "GemLite 2 bit g128", "bitsandbytes nf4"} < set(many)


def test_unknown_kernels_are_told_the_known_ones():
    check_name("lut", KERNELS, "kernels")
    with pytest.raises(UnknownNameError, match=r"No 'plane' in kernels\. Did you mean 'planes'"):
        check_name("plane", KERNELS, "kernels")


@pytest.mark.parametrize(("suffix", "head"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_plot_is_written_in_the_format_of_its_suffix(result, tmp_path, suffix, head):
    path = tmp_path / f"roofline{suffix}"
    draw_roofline(path, result)
    assert path.read_bytes().startswith(head)


def test_plot_has_one_series_per_kernel(result):
    found = series(result)
    assert list(found) == ["qtool planes", "fp16 cuBLAS"]
    assert [name for name, _ in found["fp16 cuBLAS"]] == [layer.name for layer in result.layers]


def test_plot_that_cannot_be_drawn_is_refused_at_once(monkeypatch, tmp_path):
    with pytest.raises(OutputError, match="no directory"):
        check_plot(tmp_path / "no" / "plot.png")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*'matplotlib"):
        check_plot(tmp_path / "plot.png")


def test_layers_of_a_checkpoint_are_fused_as_the_runner_has_them(checkpoint):
    work = workload.checkpoint_workload(locate(str(checkpoint)), None, None, CPU)
    got = [(layer.name, layer.count, tuple(layer.load().shape)) for layer in work.layers]
    assert got == [
        ("qkv", 2, (128, 64)),
        ("o", 2, (64, 64)),
        ("gate_up", 2, (192, 64)),
        ("down", 2, (64, 96)),
    ]
    assert [model.name for model in work.models] == [str(checkpoint)]


def test_layers_are_as_stored_for_kernels_that_read_them_so(checkpoint):
    work = workload.checkpoint_workload(locate(str(checkpoint)), None, "sign_flip", CPU)
    got = [(layer.name, layer.count, tuple(layer.load().shape)) for layer in work.layers]
    assert got == [
        ("q_proj", 4, (64, 64)),
        ("k_proj", 4, (32, 64)),
        ("gate_proj", 4, (96, 64)),
        ("down_proj", 2, (64, 96)),
    ]
    weight = work.layers[0].load()
    assert isinstance(weight, KernelWeight) and weight.stored is not None
    assert len(work.models) == 1


def test_a_family_that_the_runner_does_not_know_keeps_its_kernel_table(tiny, tmp_path):
    from qtool import pipeline
    from tests.helpers import recipe

    pipeline.quantize(Location(tiny("opt")), tmp_path / "opt", recipe())
    work = workload.checkpoint_workload(locate(str(tmp_path / "opt")), None, None, CPU)
    assert sum(layer.count for layer in work.layers) == 12
    assert work.models == ()
    assert "opt" in work.no_models


def test_a_head_tied_to_a_quantized_embedding_is_a_layer(tiny, tmp_path):
    from qtool import pipeline
    from tests.helpers import recipe

    small = recipe(embedding={"method": "rtn"})
    pipeline.quantize(Location(tiny("llama", tied=True)), tmp_path / "out", small)
    for kernel in (None, "sign_flip"):
        work = workload.checkpoint_workload(locate(str(tmp_path / "out")), None, kernel, CPU)
        head = work.layers[-1]
        assert (head.name, head.count, tuple(head.load().shape)) == ("lm_head", 1, (96, 64))
