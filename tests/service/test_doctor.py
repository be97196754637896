"""The doctor finds what was planted, says the next move, and measures what it says it measures."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel_server.cli import main
from kernel_server.doctor import between
from kernel_server.doctor.bandwidth import measure, row, table
from kernel_server.doctor.findings import Finding, Place, examine, report
from kernel_server.event_log import EventLog
from kernel_server.gateway import Gateway
from kernel_server.service import Service
from kernel_server.wire import load_or_create_tokens, token_file

ROOT = Path(__file__).parents[2]
KIB, MIB = 2**10, 2**20


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("DJINN_TOKEN", raising=False)
    return tmp_path


@pytest.fixture(autouse=True)
def _watched(no_thread_is_left: None) -> None:
    """Every test here is watched for threads it leaves."""


@contextlib.contextmanager
def _port_of_nobody() -> Iterator[int]:
    """A port where nobody listens, and nobody else can meanwhile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield int(free.getsockname()[1])


def _found(about: str, port: int | None = None) -> list[Finding]:
    with _port_of_nobody() as free:
        place = Place("127.0.0.1", port or free, None, named=port is not None)
        return [one for one in examine(place) if one.about == about]


def test_a_sound_installation_has_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    load_or_create_tokens()
    with _port_of_nobody() as port:
        found = examine(Place("127.0.0.1", port, None, named=False))

    assert [one for one in found if one.verdict == "problem"] == []
    assert {one.about for one in found} >= {"python", "packages", "device", "memory", "token"}
    assert not [one for one in found if "could not be looked at" in one.text]


def test_a_token_file_that_others_can_read_is_a_problem_with_its_cure() -> None:
    load_or_create_tokens()
    token_file().chmod(0o644)

    [found] = _found("token")
    assert found.verdict == "problem" and "chmod 600" in found.line()
    token_file().chmod(0o600)
    [found] = _found("token")
    assert found.verdict == "ok" and "1 owner" in found.text


def test_a_folder_others_may_write_in_is_a_problem() -> None:
    load_or_create_tokens()
    token_file().parent.chmod(0o777)

    [found] = _found("token")
    assert (found.verdict, found.then) == ("problem", f"chmod 700 {token_file().parent}")


def test_a_server_that_was_named_has_to_be_there() -> None:
    load_or_create_tokens()

    with _port_of_nobody() as port:
        [named] = _found("server", port)
    [unnamed] = _found("server")
    assert named.verdict == "problem" and "no server answers" in named.text
    assert unnamed.verdict == "ok"


def test_a_server_is_greeted_and_one_of_another_build_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway = Gateway("abcd", "0.1.0", EventLog())
    with Service(gateway.handle, load_or_create_tokens(), "127.0.0.1:0") as service:
        [greeted] = _found("server", service.address.port)
        monkeypatch.setattr(
            "kernel_server.protocol.messages.contract_digest", lambda: "another", raising=True
        )
        monkeypatch.setattr("kernel_server.gateway.m.contract_digest", lambda: "another")
        [other] = _found("server", service.address.port)

    assert greeted.verdict == "ok" and "abcd" in greeted.text and "our contract" in greeted.text
    assert other.verdict == "problem" and "different builds" in other.text


def test_a_wrong_token_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    with Service(lambda *_: b"", {"me": "the-right-token-of-me"}, "127.0.0.1:0") as service:
        monkeypatch.setenv("DJINN_TOKEN", "quite-another-token-of-mine")
        [found] = _found("server", service.address.port)

    assert found.verdict == "problem" and "does not know this access token" in found.text


def test_a_missing_package_of_the_server_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata as metadata

    version = metadata.version

    def without_torch(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return "5.0.0" if name == "transformers" else version(name)

    monkeypatch.setattr(metadata, "version", without_torch)

    found = {one.verdict: one.line() for one in _found("packages")}
    assert "without torch" in found["warning"] and "djinn-nb[server]" in found["warning"]
    assert "transformers 5.0.0 is outside the range" in found["problem"]


def test_without_the_wire_the_doctor_still_speaks() -> None:
    code = (
        "import sys; sys.modules['rpyc'] = None\n"
        "from kernel_server.cli import main\n"
        "from kernel_server.doctor.bandwidth import measure\n"
        "found = measure('cpu', chunks=[1000], repetitions=1)\n"
        "assert [one['name'] for one in found['rows']] == ['host copy'], found\n"
        "assert any('loopback' in what and 'rpyc' in what for what in found['absent'])\n"
        "sys.exit(main(['doctor']))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert "could not be looked at: ModuleNotFoundError" in ran.stdout, ran.stderr
    assert "memory" in ran.stdout and ran.returncode == 0


def test_on_the_path_alone_what_is_missing_is_still_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernel_server.doctor.findings._requirements", lambda: None)
    monkeypatch.setitem(sys.modules, "rpyc", None)

    found = {one.verdict: one.line() for one in _found("packages")}
    assert "only on the path" in found["warning"]
    assert "missing: rpyc" in found["problem"]


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: 1 / 0)

    [found] = _found("memory")
    assert found.verdict == "warning" and "could not be looked at: ZeroDivisionError" in found.text


def test_the_command_exits_1_on_a_problem_and_prints_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    load_or_create_tokens()
    sound = main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    with _port_of_nobody() as port:
        ill = main(["doctor", "--json", "--port", str(port)])
    told = json.loads(capsys.readouterr().out)

    assert sound == 0 and all(line.split()[0] in ("ok", "warning") for line in lines)
    assert ill == 1 and told["verdict"] == "problem"
    assert set(told["findings"][0]) == {"about", "verdict", "text", "then"}


def test_the_worst_finding_is_the_verdict() -> None:
    assert report([]) == {"verdict": "ok", "findings": []}
    found = [Finding("a", "warning", "x"), Finding("b", "ok", "y")]
    assert report(found)["verdict"] == "warning"


def test_the_figures_of_a_machine_without_gpu_name_what_is_absent() -> None:
    found = measure("cpu", chunks=[64 * KIB, MIB], repetitions=3)
    names = {one["name"] for one in found["rows"]}

    assert names >= {"host copy", "loopback, raw socket", "loopback, wire, to client"}
    assert not [name for name in names if "device" in name]
    assert any("device" in what for what in found["absent"])
    assert found["hardware"]["device"] is None and found["hardware"]["versions"]["python"]
    for one in found["rows"]:
        assert (one["unit"], one["source"], len(one["values"])) == ("GB/s", "wall clock", 3)
        assert 0 < one["q1"] <= one["median"] <= one["q3"] < 1000
    assert len(table(found)) == 2 + len(names) + len(found["absent"])
    json.dumps(found)


def test_a_rate_is_bytes_over_seconds_and_its_spread_that_of_the_repetitions() -> None:
    made = row("copy", MIB, 2_000_000_000, [1.0, 2.0, 4.0], "wall clock")

    assert made["values"] == [2.0, 1.0, 0.5]
    assert (made["q1"], made["median"], made["q3"]) == (0.5, 1.0, 2.0)


def test_a_device_that_is_not_here_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--bandwidth", "--device", "cuda:63"]) == 2
    assert "cuda:63' is not here" in capsys.readouterr().err


def test_what_shared_memory_has_no_room_for_is_absent_and_named() -> None:
    absent: list[str] = []

    assert between._shared_memory([1 << 50], 1, absent) == []
    assert len(absent) == 1 and "too small" in absent[0]


@pytest.mark.skipif(sys.platform != "linux", reason="counts bytes in shared memory of Linux")
def test_shared_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir=between.SHARED) as folder:
        monkeypatch.setattr(between, "SHARED", Path(folder))  # where no other doctor looks
        [found] = between._shared_memory([MIB], 2, [])

        assert found["name"] == "shared memory" and list(Path(folder).iterdir()) == []
