import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.scheme import Shape2D, WeightScheme
from qtool.timing import gpu, kernels, workload
from qtool.timing.kernels import Layer
from qtool.timing.peer_child import TOLERANCE, measured, tell_all
from qtool.timing.peer_runs import PeerRequest, every_peer, run_peer
from qtool.timing.peers import _peer, _vllm
from qtool.timing.synthetic import random_weight
from qtool.timing.timing import CudaTimer
from tests.unit.timing import fake_peers
from tests.unit.timing.rig import CountingTimer, bench

CPU = torch.device("cpu")
SMALL, LARGE = Shape2D(64, 32), Shape2D(96, 64)
FAKES = {peer.name: peer for peer in fake_peers.PEERS}
REQUEST = PeerRequest((SMALL, LARGE), (1, 4), 1000, CPU)
ALL = [peer for _, peer in every_peer()]


def told(name, shapes=(LARGE,)):
    lines: list[Any] = []
    request = {"shapes": shapes, "tokens": [1, 4], "l2_bytes": 1000, "device": "cpu"}
    tell_all(FAKES[name], request, lines.append)
    return lines


def program(text):
    """Return a program that does what `text` says in place of `peer_child`."""
    return (sys.executable, "-c", text)


def test_a_peer_is_checked_at_every_number_of_tokens_and_timed_on_copies():
    timer = CountingTimer()
    first, second = measured(FAKES["right"], LARGE, (1, 4), 1000, timer)
    assert (first["tokens"], second["tokens"]) == (1, 4)
    assert min(timer.calls) >= 20
    for one in (first, second):
        assert one["seconds"] == pytest.approx(1e-6)
        assert one["num_bytes"] == 500
        assert 0 < one["error"] < TOLERANCE


def test_peers_get_one_weight_and_one_input():
    seen = []

    def build(weight):
        seen.append(weight.clone())

        def product(x):
            seen.append(x)
            return x @ weight.T

        return _peer.PeerWeight(product, 10**6)

    for name in ("one", "other"):
        list(measured(_peer.Peer(name, build), SMALL, (2,), 1000, CountingTimer()))
    half = len(seen) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("elsewhere", "its product is off by 1.4 at 1 tokens, and 0.01 is allowed"),
        ("lossy", "its codes are off by 1.4"),
        ("broken", "its product is off by nan"),
        ("failing", "RuntimeError: no kernel image"),
    ],
)
def test_a_peer_whose_product_is_wrong_is_not_timed(name, why):
    (line,) = told(name)
    assert line["shape"] == LARGE
    assert why in line["failed"]


def test_a_peer_that_tells_no_codes_is_held_against_the_weight():
    assert [line["tokens"] for line in told("silent")] == [1, 4]


def test_a_shape_that_a_peer_does_not_take_ends_no_other():
    odd = Shape2D(8, 40)
    refused, *done = told("right", [odd, SMALL])
    assert refused == {"shape": odd, "failed": "ValueError: needs a multiple of 32 inputs"}
    assert [line["shape"] for line in done] == [SMALL, SMALL]


def test_a_process_tells_what_it_measured_before_it_crashed():
    done = run_peer(fake_peers.__name__, "crashing", REQUEST)
    assert [time.tokens for time in done.times[SMALL]] == [1, 4]
    assert done.times[SMALL][0].microseconds > 0
    assert set(done.times) == {SMALL}
    assert list(done.failed) == [LARGE]
    assert "ended by signal 6" in done.failed[LARGE]


def test_a_peer_that_hangs_is_stopped_with_all_that_it_started():
    hangs = (
        "import subprocess, sys, time; sys.stdin.read()\n"
        'print(\'{"shape": [64, 32], "tokens": 1, "seconds": 1e-6, "num_bytes": 5, '
        '"error": 0.001}\', flush=True)\n'
        "print('{\"shape\": [64, ', end='', flush=True)\n"
        "child = subprocess.Popen(['sleep', '60']); print(child.pid, file=sys.stderr, flush=True)\n"
        "time.sleep(60)"
    )
    begin = time.monotonic()
    done = run_peer("any", "any", REQUEST, seconds=1.5, program=program(hangs))
    assert time.monotonic() - begin < 20
    assert [time.microseconds for time in done.times[SMALL]] == [pytest.approx(1)]
    assert set(done.failed) == {SMALL, LARGE}, "4 tokens of the first are missing"
    pid = int(done.failed[LARGE].removeprefix("stopped after 1.5 s: "))
    while _is_alive(pid):  # the kernel takes a moment
        assert time.monotonic() - begin < 20
        time.sleep(0.05)


def _is_alive(pid):
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def test_a_program_that_does_not_start_is_a_failure_with_its_last_line():
    done = run_peer("any", "any", REQUEST, program=program("raise SystemExit('no such library')"))
    assert done.failed == dict.fromkeys([SMALL, LARGE], "ended with status 1: no such library")
    assert not done.times


def test_missing_peers_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "torch" or None)
    found = {peer.name: str(peer.why_not(CPU)) for peer in ALL}
    assert "CUDA" in found.pop("tinygemm int4 g128")
    assert found["Humming 3 bit g128"] == "isn't installed: pip install humming-kernels"
    assert found["Marlin int4 g128"] == "isn't installed: pip install vllm"
    assert all(why.startswith("isn't installed: pip install ") for why in found.values())


def test_a_peer_for_one_card_says_which(monkeypatch):
    machete = next(peer for peer in ALL if peer.name.startswith("Machete"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    for found, why in (((8, 0), "9.0"), ((10, 0), "9.0"), ((7, 5), "8.0"), ((9, 0), "None")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=found: found)
        assert why in str(machete.why_not(torch.device("cuda", 0)))


def test_libraries_are_asked_for_and_missing_ones_named():
    work = workload.Workload("none", (), ())
    few = gpu.time_workload(work, bench(), {}).not_run
    many = gpu.time_workload(work, bench(), {}, with_peers=True).not_run
    assert list(few) == ["tinygemm int4 g128"]
    assert set(many) == {peer.name for peer in ALL}


def test_times_of_a_peer_stand_beside_ours(monkeypatch):
    scheme = WeightScheme(num_bits=2, group_size=32)

    def load():
        return random_weight(LARGE, scheme, torch.Generator().manual_seed(0))

    monkeypatch.setattr("qtool.timing.peers._peer.Peer.why_not", lambda _self, _device: None)
    fake = (fake_peers.__name__, FAKES["right"])
    monkeypatch.setattr(gpu, "every_peer", lambda: [fake])

    def run_here(module, name, request):
        assert (module, name) == (fake_peers.__name__, "right")
        assert request.tokens == kernels.BATCHES
        text = '{{"shape": [96, 64], "tokens": {}, "seconds": {}e-6, "num_bytes": 9, "error": 0}}'
        lines = "\\n".join(text.format(count, count + 1) for count in (1, 2))
        return run_peer(module, name, request, program=program(f"print('{lines}')"))

    monkeypatch.setattr(gpu, "run_peer", run_here)
    work = workload.Workload("one", (Layer("down", 3, load),), ())
    (layer,) = gpu.time_workload(work, bench(), {}, with_peers=True).layers
    assert [row.what for row in layer.rows] == ["qtool", "fp16 cuBLAS", "right"]
    assert layer.rows[-1].microseconds == pytest.approx(2)
    assert layer.rows[-1].speedup == pytest.approx(0.5)
    assert [time.microseconds for time in layer.peers["right"]] == [pytest.approx(2), 3]
    assert "status 0" in layer.failed["right"], "batches that it didn't tell are named"


def test_codes_of_peers_fit_their_bits_and_restore_the_weight():
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).half()
    for bits, worst in ((4, 0.3), (2, 1.4)):
        codes, steps, low = _peer.affine_codes(weight, bits)
        assert codes.max() == 2**bits - 1
        assert (_peer.of_groups(codes, steps, low) - weight).abs().max() < worst
        codes, scales = _peer.symmetric_codes(weight, bits)
        assert codes.max() <= 2**bits - 1
        back = _peer.of_groups(codes, scales, -(2 ** (bits - 1)) * scales)
        assert (back - weight).abs().max() <= 0.51 * scales.max()


def test_words_hold_eight_inputs_the_first_lowest():
    codes = torch.arange(48, dtype=torch.uint8).view(3, 16) % 16
    words = _vllm.packed_inputs(codes)
    assert words.shape == (2, 3)
    back = [[(int(words[i // 8, row]) >> 4 * (i % 8)) & 15 for i in range(16)] for row in range(3)]
    assert back == codes.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("peer", ALL, ids=lambda peer: peer.name)
def test_a_peer_multiplies_by_the_weight(peer):
    device = torch.device("cuda", 0)
    reason = peer.why_not(device)
    if reason is not None:
        pytest.skip(reason)
    with torch.no_grad():
        times = list(measured(peer, Shape2D(512, 1024), (1, 16), 10**6, CudaTimer(device)))
    assert [time["tokens"] for time in times] == [1, 16]
