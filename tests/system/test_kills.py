"""Clients and servers that are killed: sessions outlive clients, clients outlive servers."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import djinn_nb as djinn
from djinn_nb import errors
from djinn_nb.embedded import read_runtime_file
from tests.djinn_nb.conftest import LONG, Process
from tests.system.conftest import PROMPT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def own_runtime(tmp_path_factory, monkeypatch) -> Iterator[Path]:
    """Runtime files of this test's own; whatever was started there is ended."""
    folder = tmp_path_factory.mktemp("run")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    state = tmp_path_factory.mktemp("state")  # no sessions of other tests come back
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    yield folder
    for pid in {*pids(folder), *servers_of(folder)}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def pids(folder: Path) -> list[int]:
    found = [read_runtime_file(file) for file in folder.rglob("*.json")]
    return [running.pid for running in found if running is not None]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(holds, timeout_s: float = 200.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


@contextlib.contextmanager
def while_it_runs(session: djinn.Session, act: Callable[[], object]) -> Iterator[None]:
    """Act on another thread once the session runs, however slow this machine is."""

    def wait_and_act() -> None:
        until(lambda: session.newest.status == "running")
        time.sleep(0.3)
        act()

    acting = threading.Thread(target=wait_and_act)
    acting.start()
    try:
        yield
    finally:
        acting.join()


CLIENT = """
import sys
import djinn_nb
server = djinn_nb.connect(sys.argv[1])
session = server.attach(sys.argv[2])
session.break_at(3, when="decode", ignore=5)
print(session.continue_(), flush=True)
if sys.argv[3] == "run":
    for point in session.breakpoints:
        point.remove()
    print("runs", flush=True)
    session.continue_()
input()
"""


@pytest.mark.parametrize("where", ["stop", "run"])
def test_a_session_outlives_the_client_that_is_killed(world, canary, where):
    rng = random.Random(where)
    for _ in range(4):
        session = world.launch(PROMPT, max_new_tokens=500, temperature=0.8, seed=3)
        expected = session.fork().continue_().tokens
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, world.process.address, session.id, where],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        with client:
            line = client.stdout.readline()
            while where == "run" and line.strip() != "runs":
                line = client.stdout.readline()
            time.sleep(rng.random() * 0.3)
            client.kill()
            client.wait()

        with world.connect() as later:
            found = later.attach(session.id)
            if where == "stop":
                assert found.stop.location == "layers.3.output"
                for point in found.breakpoints:
                    point.remove()
                end = found.continue_()
            else:
                end = found.wait()
            assert end.tokens == expected
            found.terminate()


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_waiting_client_is_told_within_seconds_that_the_server_has_gone(
    model_folder, tmp_path, ending
):
    process = Process(tmp_path / "run", "--model", str(model_folder))
    try:
        with process.connect() as server:
            session = server.launch(PROMPT, max_new_tokens=LONG)
            began = time.monotonic()
            with (
                while_it_runs(session, lambda: process.process.send_signal(ending)),
                pytest.raises((errors.ConnectionLost, errors.NoServer)) as told,
            ):
                session.continue_()
            assert time.monotonic() - began < 60  # the call itself has no end
            assert "\n" not in str(told.value)
            process.process.wait(60)
            with pytest.raises(errors.NoServer) as again:
                server.launch(PROMPT, max_new_tokens=1)
            assert "\n" not in str(again.value)
            assert session.id in repr(session)
        assert ending == signal.SIGKILL or process.process.returncode == 0
    finally:
        process.end()


def test_after_a_kill_connect_starts_another_embedded_server_with_the_sessions(
    own_runtime, model_folder
):
    with djinn.connect(model=model_folder, linger_s=60) as server:
        (pid,) = pids(own_runtime)
        session = server.launch(PROMPT, max_new_tokens=LONG)
        with (
            while_it_runs(session, lambda: os.kill(pid, signal.SIGKILL)),
            pytest.raises(errors.ConnectionFailed) as told,
        ):
            session.continue_()
        assert "\n" not in str(told.value)
        until(lambda: not runs(pid))
        with pytest.raises(errors.NoServer, match=r"; connect\(\) as before starts it again$"):
            session.continue_()
        assert list(own_runtime.rglob("*.json"))  # stale: nobody could take it away

        with djinn.connect(model=model_folder, linger_s=60) as fresh:
            assert pids(own_runtime) != [pid]
            assert list(fresh.sessions().index) == [session.id]
            fresh.attach(session.id).terminate()
            assert fresh.sessions().empty
            assert isinstance(fresh.launch(PROMPT, max_new_tokens=2).continue_(), djinn.Finished)


def test_a_runtime_file_that_names_another_process_is_no_hindrance(own_runtime, model_folder):
    with djinn.connect(model=model_folder, linger_s=60):
        (file,) = own_runtime.rglob("*.json")
        content = json.loads(file.read_text())
    os.kill(content["pid"], signal.SIGKILL)
    until(lambda: not runs(content["pid"]))
    file.write_text(json.dumps(content | {"pid": os.getpid()}))

    with djinn.connect(model=model_folder, linger_s=60) as server:
        assert isinstance(server.launch(PROMPT, max_new_tokens=1).continue_(), djinn.Finished)
        (running,) = pids(own_runtime)
        assert running != os.getpid()


def test_a_server_stays_for_an_unfinished_session_and_then_ends(own_runtime, model_folder):
    with djinn.connect(model=model_folder, linger_s=1.0) as server:
        session = server.launch(PROMPT, max_new_tokens=3)
        session.run_to(2)
        expected = session.fork().continue_().tokens
        (pid,) = pids(own_runtime)
    time.sleep(15)  # its poll for events ends after 10 s, and only then is the client known gone

    assert runs(pid)
    with djinn.connect(model=model_folder, linger_s=1.0) as later:
        assert later.attach(session.id).continue_().tokens == expected
    until(lambda: not runs(pid))
    assert not list(own_runtime.rglob("*.json"))
    assert not list(own_runtime.rglob("*.sock"))


def test_an_interrupted_start_leaves_no_server_behind(own_runtime, model_folder):
    code = "import sys, djinn_nb; djinn_nb.connect(model=sys.argv[1], linger_s=600)"
    for delay_s in (0.3, 0.6, 0.9, 1.2):
        starting = subprocess.Popen(
            [sys.executable, "-c", code, str(model_folder)],
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        time.sleep(delay_s)
        starting.send_signal(signal.SIGINT)
        starting.wait(60)

    with djinn.connect(model=model_folder, linger_s=600) as server:
        kept = server.launch(PROMPT, max_new_tokens=2, name="kept")
        kept.run_to(1)
    time.sleep(3)  # a server that was left behind would write its runtime file now
    with djinn.connect(model=model_folder, linger_s=600) as again:
        assert again.attach("kept").stop.location == "layers.1.output"
    # one that was left behind would linger for ten minutes; one that is ending may need a moment
    until(lambda: len(servers_of(own_runtime)) == 1, 120.0)


def servers_of(folder: Path) -> list[int]:
    """Processes that listen on a socket in a runtime folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if "kernel_server" in words and any(word.startswith(str(folder)) for word in words):
                found.append(int(process.name))
    return found


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("no config", errors.BrokenModel),
        ("cut weights", errors.BrokenModel),
        ("pickle", errors.UnsupportedModel),
        ("tokenizer", errors.BrokenModel),
        ("bert", errors.UnsupportedModel),
    ],
)
def test_a_broken_model_is_refused_by_name_by_connect(
    own_runtime, model_folder, tmp_path, change, error
):
    import shutil

    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    match change:
        case "no config":
            (folder / "config.json").unlink()
        case "cut weights":
            file = folder / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-100])
        case "pickle":
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        case "tokenizer":
            (folder / "tokenizer.json").write_text("{{{")
        case "bert":
            config = json.loads((folder / "config.json").read_text())
            config |= {"model_type": "bert", "architectures": ["BertModel"]}
            (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(error) as told:
        djinn.connect(model=folder)

    assert "\n" not in str(told.value)


def test_a_handle_never_acts_on_another_servers_session_of_the_same_id(model_folder, tmp_path):
    first = Process(tmp_path / "run", "--model", str(model_folder), "--no-journal")
    second = None
    try:
        server = first.connect()
        session = server.launch(PROMPT, max_new_tokens=8)
        session_id = session.id
        stop = session.run_to(2)
        first.process.kill()
        first.process.wait()
        second = Process(tmp_path / "run", "--model", str(model_folder), "--no-journal")
        with second.connect() as other:
            theirs = other.launch("Mary went to the park", max_new_tokens=8)
            theirs.run_to(2)
            before = theirs.refresh()
            assert theirs.id == session_id

            for act in (
                session.next, session.continue_, session.terminate, session.fork,
                session.refresh, stop.lens, stop.undo, lambda: stop.edit(scale=2),
                lambda: stop.hidden_states.numpy(),
            ):  # fmt: skip
                with pytest.raises(errors.UnknownSession, match="another one now") as told:
                    act()
                assert "\n" not in str(told.value)
            assert session_id in repr(session)
            assert "layers.2.output" in repr(stop)
            assert theirs.refresh() == before
            assert isinstance(server.launch(PROMPT, max_new_tokens=2).continue_(), djinn.Finished)
        server.close()
    finally:
        first.end()
        if second is not None:
            second.end()
