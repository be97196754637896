"""The command line answers a mistake with one line and the next move."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from kernel_server.cli import main


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DJINN_TOKEN", "a-token-for-these-tests-only")


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err.rstrip("\n")
    assert error.count("\n") == 0
    return error


@pytest.mark.parametrize("command", ["status", "sessions"])
def test_asking_where_no_server_listens_is_one_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

        status = main([command, "--port", str(port)])

    assert status == 2
    error = _one_line(capsys)
    assert error.startswith("NoServer: ") and str(port) in error and "serve" in error


def test_asking_at_a_socket_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["status", "--socket", str(tmp_path / "none.sock")])

    assert status == 2
    assert _one_line(capsys).startswith("NoServer: ")


@pytest.mark.parametrize("port", ["99999", "-1", "http"])
def test_a_port_that_is_none_is_refused_with_the_range(
    port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", f"--port={port}"])

    assert ended.value.code == 2
    assert f"'{port}' is no port: give a number from 0 to 65535" in capsys.readouterr().err
