"""`qtool bench` on the CPU, without the timing of anything large."""

import sys

import pytest
import torch

from qtool.core.threads import num_threads
from qtool.errors import BackendError
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.timing import gguf_peers
from qtool.timing.cpu import CpuBench, CpuProtocol, protocol_for
from qtool.timing.processor import (
    Processor,
    describe_processor,
    processor_name,
    thread_counts,
    usable_cores,
)

SHORT = CpuProtocol(prompt_tokens=6, context_tokens=2, decode_tokens=3, repeats=1)
BENCH = CpuBench(Processor("a processor", 2, "AVX2", "2.13", {1: 1e9, 2: 2e9}), SHORT)
FAKE = """
import sys, types
class Struct(types.SimpleNamespace):
    def __getattr__(self, name): return 0
class Library(types.ModuleType):
    __version__ = "0.0.7"
    llama_token = __import__("ctypes").c_int32
    def __getattr__(self, name):
        answers = {"llama_vocab_n_tokens": 50, "llama_model_size": 1000, "llama_decode": DECODE}
        if name == "llama_model_size" or name in answers: return lambda *a: answers[name]
        return lambda *a: Struct()
sys.modules["llama_cpp"] = Library("llama_cpp")
"""


def test_threads_to_time_are_powers_of_two_and_all():
    assert [thread_counts(n) for n in (1, 2, 3, 8, 12)] == [
        *([1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12])
    ]
    with num_threads(1):
        assert usable_cores() == 1


def test_the_processor_is_named_and_reads(monkeypatch):
    assert processor_name("x: y\nmodel name\t: EPYC 9\nmodel name : other") == "EPYC 9"
    assert processor_name("")
    monkeypatch.setattr("qtool.timing.processor.BANDWIDTH_FLOATS", 2**16)
    before = torch.get_num_threads()
    found = describe_processor([1, 2])
    assert found.cores == 2 and torch.get_num_threads() == before
    assert all(rate > 0 for rate in found.read_bandwidth.values())


def test_a_model_with_few_positions_is_given_no_more():
    assert protocol_for(None) == CpuProtocol() == protocol_for(4096)
    few = protocol_for(24)
    assert few.prompt_tokens == 24 and few.context_tokens + few.decode_tokens <= 24


def test_original_is_timed_by_each_number_of_threads(llama):
    loaded = load_model(Location(llama))
    speeds = BENCH.speeds(loaded, "tiny")
    assert [one.threads for one in speeds] == [1, 2]
    for one in speeds:
        assert one.by == "transformers, float32"
        assert one.prefill_tokens_per_second > 0 and one.decode_tokens_per_second > 0
        share = one.decode_tokens_per_second * one.weight_bytes / (one.threads * 1e9)
        assert one.bandwidth_share == pytest.approx(share)
    tied = loaded.model.config.tie_word_embeddings
    parameters = sum(4 * p.numel() for p in loaded.model.parameters())
    table = 4 * loaded.model.get_input_embeddings().weight.numel()
    buffers = sum(b.nbytes for b in loaded.model.buffers())
    assert speeds[0].weight_bytes == parameters + buffers - (0 if tied else table)
    assert BENCH.spans(loaded) is None


def fake_python(tmp_path, decode: int) -> str:
    """Return a Python whose llama_cpp answers, and whose `llama_decode` returns a number."""
    (tmp_path / "sitecustomize.py").write_text(FAKE.replace("DECODE", str(decode)))
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return str(program)


def test_a_gguf_file_is_timed_by_another_python(tmp_path):
    path = tmp_path / "m.gguf"
    speeds = gguf_peers.time_gguf(path, fake_python(tmp_path, 0), BENCH)
    assert [(one.name, one.by, one.threads) for one in speeds] == [
        ("m.gguf", "llama.cpp, 0.0.7", threads) for threads in (1, 2)
    ]
    assert all(one.weight_bytes == 1000 for one in speeds)


def test_what_llama_cpp_says_last_is_told(tmp_path):
    with pytest.raises(BackendError, match=r"doesn't run .*m.gguf: llama.cpp can't decode"):
        gguf_peers.time_gguf(tmp_path / "m.gguf", fake_python(tmp_path, 1), BENCH)
    with pytest.raises(BackendError, match="can't be run by"):
        gguf_peers.time_gguf(tmp_path / "m.gguf", str(tmp_path / "absent"), BENCH)


def test_without_llama_cpp_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gguf_peers, "MODULE", "no_such_module")
    with pytest.raises(BackendError, match=r"pip install llama-cpp-python.*--llama-python"):
        gguf_peers.python_with_llama(None)
    assert gguf_peers.python_with_llama("other") == "other"
