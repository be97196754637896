"""Servers that cannot be started or reached say why in one line, in Python and in a terminal."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import djinn_nb as djinn
from djinn_nb import errors as e
from tests.system.conftest import World


@pytest.mark.parametrize(
    ("address", "wishes", "error"),
    [
        (None, {"device": Path("cpu")}, e.BadArgument),
        (None, {"device": ""}, e.BadArgument),
        (None, {"dtype": "int4"}, e.BadArgument),
        (None, {"dtype": 16}, e.BadArgument),
        (None, {"model": ""}, e.BadArgument),
        (None, {"model": "a\0b"}, e.BadArgument),
        (None, {"model": "\ud800"}, e.BadArgument),
        (None, {"model": "x" * 5000}, e.BadArgument),
        (None, {"model": 7}, e.BadArgument),
        (None, {"geometry": "a\0b"}, e.BadArgument),
        (None, {"kv_memory": 1.5}, e.BadArgument),
        (None, {"kv_memory": True}, e.BadArgument),
        (None, {"kv_memory": "lots"}, e.BadArgument),
        (None, {"kv_memory": -5}, e.BadArgument),
        (None, {"threads": 0}, e.BadArgument),
        (None, {"decode_bucket": 4}, e.BadArgument),
        (None, {"model": "gpt2", "geometry": "gpt2"}, e.BadArgument),
        (None, {"speed": "fast"}, e.BadArgument),
        (None, {"token": 7}, e.BadArgument),
        ("127.0.0.1:1", {}, e.NoServer),
        ("127.0.0.1:1", {"kv_memory": "1GiB"}, e.BadArgument),
        ("127.0.0.1:99999", {}, e.BadArgument),
        ("no such host:5", {}, e.BadArgument),
        ("nosuch.invalid:5", {}, e.NoServer),
        ("x" * 100_000, {}, e.BadArgument),
        ("\ud800:5", {}, e.BadArgument),
        ("unix:relative", {}, e.BadArgument),
        ("unix:/a\0b", {}, e.BadArgument),
        ("unix:/" + "x" * 200, {}, e.NoServer),
        (b"localhost:5", {}, e.BadArgument),
        (7, {}, e.BadArgument),
    ],
)
def test_connecting_in_vain_is_told_in_one_line(world: World, address, wishes, error):
    with pytest.raises(error) as told:
        djinn.connect(address, **wishes)

    assert type(told.value) is error
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 600


@pytest.mark.parametrize(
    "variable", ["XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_DATA_HOME"], ids=lambda v: v[4:]
)
def test_folders_that_cannot_be_written_are_named(variable, monkeypatch):
    monkeypatch.setenv(variable, "/proc/nowhere")

    with pytest.raises((e.NoServer, e.BadArgument), match=f"/proc/nowhere.*{variable}") as told:
        djinn.connect(prefill_chunk=77)  # a wish of its own: no server of another test is found

    assert "\n" not in str(told.value)


def test_a_wrong_token_is_refused_also_for_the_embedded_server(world: World, monkeypatch):
    monkeypatch.setenv("DJINN_TOKEN", "not-the-token-of-anyone")

    with pytest.raises(e.AccessDenied) as told:
        djinn.connect(world.process.address)

    assert "\n" not in str(told.value)


def test_without_a_token_it_is_told_where_one_was_looked_for(world: World, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))

    with pytest.raises(e.AccessDenied, match=r"DJINN_TOKEN.*tokens\.json") as told:
        djinn.connect(world.process.address)

    assert "\n" not in str(told.value)


def command(*words: str, **environment: str) -> tuple[int, str]:
    made = subprocess.run(
        [sys.executable, "-m", "kernel_server", *words],
        capture_output=True, text=True, timeout=240, env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    return made.returncode, (made.stdout + made.stderr).strip()


@pytest.mark.parametrize(
    ("words", "begins"),
    [
        ("serve --port {taken}", "PortInUse: port"),
        ("serve --host 0.0.0.0", "AddressRefused: 0.0.0.0:5556 is not loopback"),
        ("serve --socket /tmp/open.sock", "AddressRefused: /tmp is open to others"),
        ("serve --kv-memory lots", "BadArgument: 'lots'"),
        ("serve --threads 0", "BadArgument: --threads is 0"),
        ("serve --model a --geometry b", "BadArgument: give --model or --geometry"),
        ("serve --gpu 0 --device cpu", "BadArgument: give --gpu or --device"),
        ("serve --port 0 --runtime-file /proc/nowhere/x.json", "BadArgument: the runtime file"),
        ("status --port 1", "NoServer: no server answers at 127.0.0.1:1"),
        ("sessions --socket /proc/nowhere.sock", "NoServer: no server answers at unix:"),
        ("serve --port many", "usage"),
        ("serve --speed fast", "usage"),
        ("nonsense", "usage"),
    ],
)
def test_the_command_line_refuses_in_one_line(words, begins):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, text = command(*words.format(taken=port).split())

    assert status == 2
    assert text.startswith(begins)
    assert "Traceback" not in text
    assert begins == "usage" or "\n" not in text


def test_status_and_sessions_of_a_server_with_a_wrong_token_are_refused(world: World):
    place = str(world.folder / "server.sock")

    status, text = command("status", "--socket", place, DJINN_TOKEN="not-the-token-of-anyone")

    assert (status, text.partition(":")[0]) == (2, "AccessDenied")
    assert command("sessions", "--socket", place)[0] == 0
