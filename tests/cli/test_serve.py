"""`qtool serve`: what is wrong before it serves; tests/docs/test_serving.py runs it."""

import socket
import sys

import pytest

from tests.cli.conftest import Cli


def test_a_port_that_is_taken_is_told(cli: Cli, checkpoint):
    pytest.importorskip("fastapi", reason="the extra `serve` isn't installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = cli("serve", str(checkpoint), "--port", str(port))
    assert done.code == 1
    assert f"Can't listen on 127.0.0.1, port {port}" in done.err
    assert "--port" in done.err


def test_a_context_that_the_model_has_no_positions_for(cli: Cli, checkpoint):
    pytest.importorskip("fastapi", reason="the extra `serve` isn't installed")
    done = cli("serve", str(checkpoint), "--port", "0", "--max-model-len", "4096")
    assert done.code == 1
    assert "has 512 positions" in done.err


@pytest.mark.parametrize("key", ["schl\u00fcssel", "two words"])
def test_a_key_that_no_client_can_send(cli: Cli, checkpoint, key):
    pytest.importorskip("fastapi", reason="the extra `serve` isn't installed")
    done = cli("serve", str(checkpoint), "--api-key", key)
    assert done.code == 1
    assert "which clients can't send" in done.err


@pytest.mark.parametrize("text", [None, " \n"])
def test_a_key_that_cannot_be_read(cli: Cli, checkpoint, tmp_path, text):
    pytest.importorskip("fastapi", reason="the extra `serve` isn't installed")
    if text is not None:
        (tmp_path / "key").write_text(text)
    done = cli("serve", str(checkpoint), "--api-key", f"@{tmp_path / 'key'}")
    assert done.code == 1
    assert "--api-key" in done.err


def test_an_open_address_without_a_key_is_warned_of(cli: Cli, checkpoint):
    pytest.importorskip("fastapi", reason="the extra `serve` isn't installed")
    options = ("--host", "192.0.2.1", "--port", "0")  # nobody's: so it ends
    done = cli("serve", str(checkpoint), *options)
    assert done.code == 1
    assert "without --api-key" in done.err
    assert "Can't listen on 192.0.2.1" in done.err
    assert "without --api-key" not in cli("serve", "x", *options, "--api-key", "k").err


def test_without_the_extra_it_says_what_to_install(cli: Cli, checkpoint, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "fastapi" else found(name, *a)
    )
    monkeypatch.delitem(sys.modules, "fastapi", raising=False)
    done = cli("serve", str(checkpoint))
    assert done.code == 1
    assert "needs the 'serve' extra" in done.err
