"""The command line answers a mistake with one line and the next move."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from kernel_server.cli import _parser, main, quotas_of
from kernel_server.config import Quotas
from kernel_server.protocol.errors import BadArgument


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


def _quotas(*flags: str) -> Quotas:
    return quotas_of(_parser().parse_args(["serve", *flags]))


def test_every_quota_of_an_owner_has_a_flag() -> None:
    asked = _quotas(
        *("--sessions-per-owner", "3", "--kv-per-owner", "1GiB", "--transfers-per-owner", "2MiB"),
        *("--edits-per-owner", "3KiB", "--captures-per-owner", "4MB", "--jobs-per-owner", "5"),
        *("--connections-per-owner", "6", "--vectors-per-owner", "7"),
        *("--vector-bytes-per-owner", "8KiB"),
    )

    assert asked == Quotas(
        sessions=3,
        kv_bytes=1 << 30,
        transfer_bytes=2 << 20,
        edit_bytes=3 << 10,
        capture_bytes=4_000_000,
        jobs=5,
        connections=6,
        vectors=7,
        vector_bytes=8 << 10,
    )
    assert _quotas() == Quotas()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--sessions-per-owner", "0"),
        ("--jobs-per-owner", "many"),
        ("--jobs-per-owner", "-1"),
        ("--kv-per-owner", "0"),
        ("--transfers-per-owner", "lots"),
    ],
)
def test_a_quota_that_is_none_is_refused(flag: str, value: str) -> None:
    with pytest.raises(BadArgument):
        _quotas(f"{flag}={value}")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lease", "8h", "--no-journal"), ("--lease needs a journal", "would be lost")),
        (("--lease", "soon"), ("'soon' is no duration", "8h, 90min, 30s")),
        (("--lease", "-8h"), ()),
        (("--lease", "0.5s"), ("at least 1 s", "90min")),
        (("--idle-after", "a while"), ("'a while' is no duration",)),
    ],
)
def test_a_lease_that_is_none_is_refused_with_what_to_do(
    flags: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["serve", *flags])
    except SystemExit as ended:  # one that looks like a flag is for the parser
        assert ended.code == 2 and not words
        return

    assert status == 2
    error = _one_line(capsys)
    assert error.startswith("BadArgument: ")
    assert not [word for word in words if word not in error], error


def test_serve_tells_of_the_lease(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])

    told = " ".join(capsys.readouterr().out.split())
    assert "--lease DURATION" in told and "warned of at nine tenths" in told
