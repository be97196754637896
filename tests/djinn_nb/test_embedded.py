"""The embedded server: started when none runs, found when one does, reported when it cannot."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import djinn_nb as djinn
from djinn_nb import embedded, errors
from djinn_nb.client import POLL_WAIT_S
from djinn_nb.connection import open_client
from djinn_nb.embedded import Wanted, read_runtime_file
from kernel_server.server import FAILED_S
from tests.djinn_nb.conftest import Process
from tests.djinn_nb.held_back import held_back


@pytest.fixture
def own_folders(tmp_path_factory, monkeypatch) -> Iterator[Path]:
    """Runtime folders of this test's own; whatever was started there is ended."""
    folder = tmp_path_factory.mktemp("run")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    # no sessions of other tests come back
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    yield folder
    for file in folder.rglob("*.json"):
        if (running := read_runtime_file(file)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(running.pid, signal.SIGKILL)


def _pid(folder: Path) -> int:
    files = list(folder.rglob("*.json"))
    assert len(files) == 1
    return int(json.loads(files[0].read_text())["pid"])


def test_connecting_twice_finds_the_same_server_and_its_sessions(own_folders, model_folder):
    with djinn.connect(model=model_folder, linger_s=60) as first:
        session = first.launch([1, 2, 3], max_new_tokens=4, name="kept")
        session.run_to(2)
        pid = _pid(own_folders)

    with djinn.connect(model=os.path.relpath(model_folder), linger_s=60) as second:
        assert second.address == first.address
        assert _pid(own_folders) == pid
        assert second.attach("kept").stop.location == "layers.2.output"

    for file in own_folders.rglob("*"):
        assert not stat.S_IMODE(file.lstat().st_mode) & 0o077 or file.suffix == ".lock"


def test_of_two_connects_at_once_one_starts_the_server(own_folders, model_folder):
    code = (
        "import djinn_nb, sys\n"
        "server = djinn_nb.connect(model=sys.argv[1], linger_s=60)\n"
        "print(server.address)\n"
        "server.close()\n"
    )
    command = [sys.executable, "-c", code, str(model_folder)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    addresses = {process.communicate(timeout=240)[0].strip() for process in both}

    assert len(addresses) == 1
    assert addresses != {""}


@pytest.mark.slow
def test_a_dead_servers_runtime_file_is_no_hindrance(own_folders, model_folder):
    with djinn.connect(model=model_folder, linger_s=60):
        pid = _pid(own_folders)
    os.kill(pid, signal.SIGKILL)

    with djinn.connect(model=model_folder, linger_s=60) as server:
        assert _pid(own_folders) != pid
        assert server.launch([1], max_new_tokens=1).continue_().finish_reason


@pytest.mark.slow
def test_a_server_for_a_named_model_ends_soon_after_its_last_client(own_folders, model_folder):
    djinn.connect(model=model_folder).close()
    pid = _pid(own_folders)

    # it learns that the client has gone when its poll for events ends
    deadline = time.monotonic() + POLL_WAIT_S + embedded.LINGER_NAMED_S + 200
    while list(own_folders.rglob("*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_folder_without_a_model_is_told_and_not_remembered(own_folders, tmp_path):
    for _ in range(2):
        with pytest.raises((errors.BrokenModel, errors.ModelNotFound)) as caught:
            djinn.connect(model=tmp_path)
        assert "\n" not in str(caught.value)

    with pytest.raises(errors.DjinnError):
        djinn.connect(model=tmp_path / "nowhere")


def test_a_server_that_ends_when_it_was_just_found_is_started_again(
    own_folders, model_folder, monkeypatch
):
    djinn.connect(model=model_folder, linger_s=60).close()
    ended = _pid(own_folders)
    to_end = [ended]
    find = embedded.find_or_start

    def find_and_end(wanted: Wanted) -> str:
        address = find(wanted)
        while to_end:
            os.kill(to_end.pop(), signal.SIGKILL)
            while Path(f"/proc/{ended}").exists():
                time.sleep(0.01)
        return address

    monkeypatch.setattr(embedded, "find_or_start", find_and_end)
    with djinn.connect(model=model_folder, linger_s=60) as server:
        assert _pid(own_folders) != ended
        assert server.launch([1], max_new_tokens=1).continue_().finish_reason


def test_an_interrupt_while_the_process_begins_leaves_none_behind(
    own_folders, model_folder, monkeypatch, eventually
):
    begin, begun = subprocess.Popen, []

    def interrupted(*given: Any, **more: Any) -> subprocess.Popen:
        begun.append(begin(*given, **more))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)  # whoever is interrupted does not come to its end
        return begun[0]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        djinn.connect(model=model_folder, linger_s=600)

    eventually(lambda: len(begun) == 1 and begun[0].poll() is not None)
    assert not list(own_folders.rglob("*.json"))


@pytest.mark.slow
def test_a_server_whose_model_is_broken_stays_until_its_client_has_asked_why(
    model_folder, tmp_path, eventually
):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "config.json").write_text("{")
    with held_back(folder / "config.json") as held:
        process = Process(tmp_path / "run", "--model", str(folder))
        try:
            eventually(held.is_read)
            client = open_client(process.address)
            assert client.initialize().phase == "loading"
            held.give()
            time.sleep(FAILED_S + 2)  # busy with something else

            assert client.initialize().error.code == "BrokenModel"
            client.close()
            assert process.process.wait(60) == 2
        finally:
            process.end()


def test_a_server_that_cannot_start_shows_the_end_of_its_log(own_folders):
    with pytest.raises(errors.DjinnError) as caught:
        djinn.connect(geometry="no-such-geometry")

    assert "no-such-geometry" in str(caught.value)


@pytest.mark.parametrize(
    "wishes",
    [
        {"speed": "fast"},
        {"prefill_chunk": "many"},
        {"prefill_chunk": True},
        {"geometry": 7},
        {"model": 7},
        {"dtype": 16},
        {"check": 1},
    ],
    ids=str,
)
def test_bad_wishes_are_refused_before_anything_starts(own_folders, wishes):
    with pytest.raises(errors.BadArgument):
        djinn.connect(**wishes)

    assert not list(own_folders.rglob("*.log"))


def test_an_unknown_option_lists_the_known_ones():
    with pytest.raises(errors.BadArgument, match=r"kv_memory.*prefill_chunk"):
        Wanted.of(None, None, None, {"speed": 1})


def test_other_wishes_are_another_server(model_folder, monkeypatch):
    base = Wanted.of(str(model_folder), None, None, {})

    others = [
        Wanted.of(None, None, None, {}),
        Wanted.of(str(model_folder), "cpu", None, {}),
        Wanted.of(str(model_folder), None, "bfloat16", {}),
        Wanted.of(str(model_folder), None, None, {"prefill_chunk": 64}),
    ]

    assert len({base.key, *(other.key for other in others)}) == 5
    assert Wanted.of(f"{model_folder}/", None, None, {"prefill_chunk": None}).key == base.key


def test_wishes_become_flags():
    options = {"kv_memory": 1 << 20, "check": True, "geometry": "gpt2", "seed": 3}
    wanted = Wanted.of(None, "cpu", "torch.bfloat16", options)

    flags = " ".join(wanted.flags())

    assert "--device cpu --dtype bfloat16" in flags
    assert "--kv-memory 1048576" in flags
    assert "--geometry gpt2" in flags
    assert "--check " in flags
    assert f"--linger-s {embedded.LINGER_NAMED_S}" in flags


def test_a_runtime_folder_open_to_others_is_refused(own_folders):
    (own_folders / "djinn").mkdir(mode=0o755)
    (own_folders / "djinn").chmod(0o755)

    with pytest.raises(errors.AddressRefused, match="chmod 700"):
        djinn.connect()


def test_a_runtime_file_cut_short_is_none(tmp_path):
    file = tmp_path / "x.json"
    for text in ("", "{", "[]", '{"address": "a"}'):
        file.write_text(text)
        assert read_runtime_file(file) is None
