"""Kernels compiled before they are launched: which ones, side by side, and what is kept of them."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qtool.errors import BackendError
from qtool.runtime.backends.cuda import compiling
from qtool.runtime.backends.cuda.decode_ops import KernelOps
from qtool.runtime.backends.cuda.launch import Card, KernelCall
from qtool.runtime.decode.slots import SlotRunner
from qtool.scheme import WeightScheme
from qtool.serving.decoders import PromptPart, RunnerDecoder
from qtool.timing.shapes import find_shapes
from qtool.timing.synthetic import random_decoder

CALL = KernelCall("rms_norm", "rms_norm", (("HIDDEN", 64),), (1, 1, 1), 32, 0, ())
"""As good as any."""


class Nvrtc:
    """A compiler that isn't there."""

    class NVRTCError(Exception):
        pass

    def __init__(self) -> None:
        self.compiled: list[tuple[str, tuple[str, ...]]] = []
        self.version = (13, 0)

    def getVersion(self):  # noqa: N802 - its names
        return self.version

    def createProgram(self, text, *_):  # noqa: N802
        return text

    def compileProgram(self, program, options):  # noqa: N802
        if program == "wrong":
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION")
        self.compiled.append((program, options))

    def getCUBIN(self, program):  # noqa: N802
        return f"code of {program} {len(self.compiled)}".encode()

    def getProgramLog(self, _program):  # noqa: N802
        return "line 1:\n  no"

    def destroyProgram(self, _program):  # noqa: N802
        pass


@pytest.fixture
def nvrtc(monkeypatch, tmp_path):
    made = Nvrtc()
    cuda = SimpleNamespace(nvrtc=made)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    return made


def test_code_of_one_architecture_is_compiled_once_for_all_processes(nvrtc, tmp_path):
    first = compiling.machine_code("text", "sm_90a")
    assert nvrtc.compiled == [("text", ("--std=c++17", "-arch=sm_90a"))]
    assert compiling.machine_code("text", "sm_90a") == first == b"code of text 1"
    assert len(nvrtc.compiled) == 1
    assert compiling.machine_code("text ", "sm_90a") == b"code of text  2"
    assert compiling.machine_code("text", "sm_100a") == b"code of text 3"
    nvrtc.version = (13, 1)
    assert compiling.machine_code("text", "sm_90a") == b"code of text 4"
    assert len(list((tmp_path / "cache/cuda").glob("*.cubin"))) == 4


@pytest.mark.usefixtures("nvrtc")
def test_what_cant_be_kept_is_compiled_anew(tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    assert compiling.machine_code("text", "sm_90a") == b"code of text 1"
    assert compiling.machine_code("text", "sm_90a") == b"code of text 2"


@pytest.mark.usefixtures("nvrtc")
def test_what_isnt_compiled_says_why_and_isnt_kept(tmp_path):
    with pytest.raises(BackendError, match=r"-arch=sm_90a\): NVRTC_ERROR_COMPILATION: line 1: no"):
        compiling.machine_code("wrong", "sm_90a")
    assert not (tmp_path / "cache").exists()


def test_each_kernel_is_compiled_once_however_often_it_is_launched(monkeypatch):
    asked: list[tuple[compiling.KernelSource, int]] = []
    monkeypatch.setattr(compiling, "compiled_function", lambda *what: asked.append(what))
    other = CALL._replace(constants=(("HIDDEN", 128),))
    compiling.compile_ahead([CALL, CALL._replace(grid=(7, 1, 1)), other], 3)
    assert sorted(asked) == [(compiling.source_of(CALL), 3), (compiling.source_of(other), 3)]


def test_the_first_kernel_that_isnt_compiled_is_told(monkeypatch):
    def refuse(_source, _device):
        raise BackendError("no")

    monkeypatch.setattr(compiling, "compiled_function", refuse)
    with pytest.raises(BackendError, match="no"):
        compiling.compile_ahead([CALL], 0)


LENGTHS = (1, 3, 16, 40, 100, 200)


@pytest.mark.parametrize("num_bits", [2, 4])
@torch.no_grad()
def test_all_that_a_server_launches_is_compiled_ahead_and_nothing_else(num_bits):
    decoder_sizes = find_shapes("llama3-8b").decoder
    assert decoder_sizes is not None
    sizes = replace(
        decoder_sizes,
        num_layers=1,
        vocab_size=300,
        hidden_size=512,
        intermediate_size=640,
        num_heads=4,
        num_key_value_heads=2,
    )
    scheme, card = WeightScheme(num_bits=num_bits, group_size=64), Card(132, 227 * 1024, "", True)
    weights = random_decoder(sizes, scheme, torch.device("cpu"))
    launched: list[KernelCall] = []
    ahead: list[KernelCall] = []
    ops = KernelOps(lambda call, _: launched.append(call), card, ahead.extend)
    runner = SlotRunner(weights, ops, max_length=256, slots=16)
    runner.prepare(LENGTHS)
    assert not launched
    assert not runner.state.positions.any()
    decoder = RunnerDecoder(runner)
    for width in (1, 2, 4, 8, 16):
        decoder.step(torch.zeros(width, dtype=torch.int64))
    for length in LENGTHS:
        logits = decoder.read([PromptPart(0, 0, [0] * length)])
        decoder.draw(logits, logits.argmax(-1), torch.ones(1, 4, dtype=torch.float64))
    assert {*map(compiling.source_of, ahead)} == {*map(compiling.source_of, launched)}
    assert {"nucleus", "prompt_heads", "decode_attention", "bit_plane_wgmma"} < {
        call.kernel for call in ahead
    }
