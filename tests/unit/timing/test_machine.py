import pytest

from qtool.errors import BackendError, MissingExtraError
from qtool.timing import machine


def test_answer_of_nvidia_smi_is_parsed():
    told = machine.parse_query("580.65.06, 1755, 1980, 700.00\n1, 2, 3, 4\n")
    assert told["driver_version"] == "580.65.06"
    assert machine._whole(told["clocks.sm"]) == 1755
    assert machine._number(told["power.limit"]) == 700.0
    assert machine._whole("[N/A]") is None
    assert machine.parse_query("No devices were found\n") == {}


def test_without_nvidia_smi_nothing_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._nvidia_smi("", lambda: None) == {}


def test_the_card_is_busy_while_nvidia_smi_is_asked(monkeypatch, tmp_path):
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\n/bin/sleep 0.2\necho 1.0, 2, 3, $3\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    loads = []
    told = machine._nvidia_smi("abc", lambda: loads.append(1))
    assert told["power.limit"] == "--id=GPU-abc"
    assert loads


def test_no_card_an_old_one_and_no_cupy_are_said(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"CUDA card.*sees none"):
        machine.require_card()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    with pytest.raises(BackendError, match="Tesla T4 is older"):
        machine.require_card()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"needs the 'gpu' extra\. Run: pip install 'cupy"):
        machine.require_card()
