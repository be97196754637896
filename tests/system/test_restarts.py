"""Servers that end and are started again, as processes: sessions go on bit for bit."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import djinn_nb as djinn
from djinn_nb import errors
from tests.djinn_nb.conftest import LONG, Process
from tests.system.conftest import FAULTS, PROMPT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NEXT = 64


class Restarts:
    """One server at one address after another, with one journal."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder, self.flags = folder, flags
        self.process = Process(folder, *flags)
        self.server = self.process.connect()

    def kill(self, ending: int = signal.SIGKILL) -> None:
        self.process.process.send_signal(ending)
        self.process.process.wait(60)
        self.process.end()

    def start(self, *flags: str) -> None:
        self.require_sound()
        self.process = Process(self.folder, *self.flags, *flags)

    def restart(self, ending: int = signal.SIGKILL, *flags: str) -> None:
        self.kill(ending)
        self.start(*flags)
        self.process.connect().close()

    def require_sound(self) -> None:
        log = (self.folder / "log").read_text()
        assert not [word for word in FAULTS if word in log], log[-3000:]

    def close(self) -> None:
        self.server.close()
        self.process.end()


@pytest.fixture
def restarts(model_folder: Path, tmp_path: Path) -> Iterator[Restarts]:
    made = Restarts(
        tmp_path / "run", "--model", str(model_folder), "--prefill-chunk", "8", "--check"
    )
    yield made
    made.close()
    made.require_sound()


def finished(session: djinn.Session) -> list[int]:
    """Its tokens at the end, past every breakpoint."""
    for point in session.breakpoints:
        point.remove()
    if session.status != "finished":
        session.continue_()
    return list(session.tokens)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_handle_goes_on_where_it_was_shown_to_stand(restarts, ending):
    server = restarts.server
    session = server.launch(PROMPT, max_new_tokens=NEXT, temperature=0.8, seed=4, name="mine")
    session.break_at(3, when="decode", ignore=4)
    stop = session.continue_()
    stop.edit(add=np.linspace(-1, 1, 32, dtype=np.float32), alpha=2.0, tokens=-1)
    stop.edit(scale=1.1, sticky=True)
    session.run_to("layers.4.middle").edit(scale=0.9)
    stop = session.run_to("layers.2.output")
    value, hits = stop.hidden_states.numpy(), session.breakpoints[0].hits
    before = session.refresh()
    expected = finished(session.fork())

    restarts.restart(ending)

    info = session.refresh()
    assert (info.status, info.stop, info.tokens) == ("stopped", before.stop, before.tokens)
    assert (info.name, info.edits, info.dormant) == ("mine", before.edits, True)
    assert session.breakpoints[0].hits == hits
    np.testing.assert_array_equal(session.stop.hidden_states.numpy(), value)
    np.testing.assert_array_equal(stop.hidden_states.numpy(), value)
    assert finished(session) == expected


def test_branches_can_be_returned_to_after_a_restart(restarts):
    session = restarts.server.launch(PROMPT, max_new_tokens=8, temperature=0.8, seed=4)
    first = session.run_to("layers.1.output")
    session.run_to("logits")
    plain = finished(session)
    end = session.branches()[-1].number
    session.go_to(first).edit(scale=-3.0)
    edited = finished(session)
    assert plain != edited

    restarts.restart()

    session.go_to(end)
    assert session.tokens == plain
    session.go_to(first)
    assert finished(session) == plain
    other = next(n for n in reversed(session.branches()) if n.status == "finished" and n.branch)
    session.go_to(other.number)
    assert session.tokens in (plain, edited)


def test_what_ran_goes_on_from_where_it_was_recorded(restarts):
    server = restarts.server
    session = server.launch(PROMPT, max_new_tokens=LONG, temperature=0.8, seed=4)

    def kill() -> None:
        with restarts.process.connect() as other:
            seen = other.attach(session.id)
            until(lambda: len(seen.refresh().tokens) > 40)
            journal = journal_of(restarts.process.process.pid)
            for _ in range(2):  # one record may have been on its way already
                size = journal.stat().st_size
                until(lambda size=size: journal.stat().st_size != size)
            restarts.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(errors.ConnectionFailed):
        session.continue_()
    killer.join()
    restarts.start()
    restarts.process.connect().close()

    info = session.refresh()
    assert info.status == "waiting" and len(info.tokens) > 20
    reference = server.launch(PROMPT, max_new_tokens=len(info.tokens), temperature=0.8, seed=4)
    expected = finished(reference)
    assert expected[: len(info.tokens)] == list(info.tokens)
    session.break_at("logits", ignore=NEXT)
    stop = session.continue_()
    more = server.launch(PROMPT, max_new_tokens=stop.forward, temperature=0.8, seed=4)
    assert list(session.tokens) == finished(more)
    assert len(session.tokens) >= len(info.tokens) + NEXT


def test_another_fingerprint_is_refused_and_can_be_accepted(restarts):
    session = restarts.server.launch(PROMPT, max_new_tokens=8)
    session.run_to(2)
    restarts.flags = (*restarts.flags, "--prefill-chunk", "16")
    restarts.restart()

    assert "prefill_chunk was 8, is 16" in restarts.server.sessions().loc[session.id, "note"]
    with pytest.raises(errors.WrongFingerprint, match="inexact=True"):
        session.continue_()
    again = restarts.server.attach(session.id, inexact=True)
    assert isinstance(again.continue_(), djinn.Finished)
    assert again.newest.inexact
    assert restarts.server.sessions().loc[session.id, "note"] == "inexact"


def test_a_client_that_waits_for_the_new_server_gets_its_answer(restarts):
    session = restarts.server.launch(PROMPT, max_new_tokens=8)
    stop = session.run_to(2)
    expected = finished(session.fork())
    restarts.kill()
    restarts.start()
    deadline = time.monotonic() + 200
    while True:  # as a person would: again, until it answers
        try:
            text = stop.lens(top_k=1)
            break
        except errors.ConnectionFailed:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert len(text)
    assert finished(session) == expected


def act(rng: random.Random, session: djinn.Session, seen: dict[str, Any]) -> None:
    """Something a person does; `seen` holds what they were shown of each session."""
    choice = rng.randrange(8)
    if session.status == "finished":
        return
    if choice < 3:
        rng.choice([session.next, session.step_out, session.step_in])()
    elif choice == 3:
        session.run_to(rng.randrange(6))
    elif choice == 4 and session.stop is not None:
        session.stop.edit(scale=1.0 + rng.random() / 8, tokens=-1)
    elif choice == 5 and session.newest.forward:
        session.rewind(rng.randrange(session.newest.forward), rng.randrange(6))
    elif choice == 6 and session.status == "stopped":
        session.step_back()
    else:
        session.break_at(rng.randrange(6), ignore=rng.randrange(9), when="decode")
        session.continue_()
    info = session.newest
    seen[session.id] = (info.stop_number, tuple(info.tokens), info.location, len(info.edits))


@pytest.mark.timeout(3600)  # twenty starts of a server
def test_twenty_kills_at_random_moments_lose_no_stop_that_was_shown(restarts):
    """Prefill, decode, stopped, edited, forked, stepped back, written: whatever it was doing."""
    rng = random.Random(20)
    server = restarts.server
    ids = list(range(3, 60))
    sessions = [
        server.launch(ids * (1, 2, 4)[i], max_new_tokens=NEXT + 40, temperature=0.8, seed=i)
        for i in range(3)
    ]
    #: one that nobody touches: its next tokens must be those of an undisturbed run
    still = server.launch(PROMPT, max_new_tokens=NEXT, temperature=0.8, seed=9)
    still.run_to("layers.2.middle").edit(scale=1.25)
    expected = finished(still.fork())
    kills = 0
    while kills < 20:
        kills += 1
        seen: dict[str, Any] = {}
        timer = threading.Timer(rng.random() * 1.2, restarts.kill)
        timer.start()
        try:
            while True:
                act(rng, rng.choice(sessions), seen)
        except errors.ConnectionFailed:
            pass
        except errors.BadArgument:
            pass
        except errors.DjinnError as error:
            assert "\n" not in str(error)
        timer.join()
        restarts.start()
        with restarts.process.connect():
            pass
        listed = {info.id: info for info in server._infos()}
        assert {s.id for s in (*sessions, still)} <= set(listed)
        for session_id, (number, tokens, location, _) in seen.items():
            info = listed[session_id]
            # it stands where it was shown to, or has gone on from there
            assert info.stop_number >= number, (session_id, number, info)
            if info.stop_number == number:
                assert (tuple(info.tokens), info.location) == (tokens, location)
        for session in sessions:
            session.stop  # noqa: B018 - a step may have been made whose answer never came
    for session in sessions:
        # undisturbed: the same session, copied and run by this server in one go
        copy = finished(session.fork())
        assert finished(session) == copy
    assert finished(still) == expected


def journal_of(pid: int) -> Path:
    """The journal that a server holds open."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = link.readlink()
            if target.name == "journal":
                return target
    raise AssertionError(f"{pid} holds no journal")


def until(holds: Any, timeout_s: float = 200.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def test_a_full_disk_takes_nothing_down_and_loses_nothing_that_is_there(restarts):
    """The limit is the system's own, on how large a file of the server may become."""
    server, pid = restarts.server, restarts.process.process.pid
    session = server.launch(PROMPT, max_new_tokens=NEXT + 8, temperature=0.8, seed=2)
    kept = session.run_to("layers.1.output")
    expected = finished(session.fork())
    full = journal_of(pid).stat().st_size + 100
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (full, hard))
    with pytest.warns(UserWarning, match="cannot be written.*File too large") as told:
        session.run_to("layers.2.output")
        until(lambda: server.client.initialize().not_durable and len(told))
        session.run_to("layers.3.output")
    assert all("\n" not in str(one.message) for one in told)
    assert journal_of(pid).stat().st_size <= full
    later = session.fork()
    assert finished(later) == expected  # sessions go on

    restarts.kill()
    restarts.start()
    restarts.process.connect().close()
    with pytest.warns(UserWarning, match="durable again"):
        info = session.refresh()
    # what was durable is there; the rest was said to be lost
    assert (info.stop_number, info.location) == (kept.number, "layers.1.output")
    assert list(server.sessions().index).count(later.id) == 0
    again = server.attach(session.id)
    assert finished(again.fork()) == expected

    pid = restarts.process.process.pid
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (journal_of(pid).stat().st_size + 100, hard))
    with pytest.warns(UserWarning, match="cannot be written") as told:
        again.run_to("layers.4.output")
        until(lambda: server.client.initialize().not_durable and len(told))
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    with pytest.warns(UserWarning, match="durable again") as told:
        until(lambda: not server.client.initialize().not_durable and len(told))
    restarts.restart()
    assert again.refresh().location == "layers.4.output"
    assert finished(again) == expected


def test_where_the_device_has_no_room_to_compute_one_again_it_says_so_and_waits(restarts):
    restarts.close()
    restarts.flags = (*restarts.flags, "--kv-memory", "2MiB")
    restarts.process = Process(restarts.folder, *restarts.flags)
    restarts.server = server = restarts.process.connect()
    ids = list(range(3, 100)) * 3
    sessions: list[djinn.Session] = []
    with pytest.raises(errors.OutOfPages):
        while True:
            sessions.append(server.launch(ids, max_new_tokens=NEXT, temperature=0.8, seed=1))
            sessions[-1].run_to("layers.5.output")
    full = sessions.pop()
    full.terminate()
    assert len(sessions) > 1
    expected = finished(sessions.pop())

    restarts.restart()

    assert {s.id for s in sessions} <= set(server.sessions().index)
    other = server.launch(list(range(3, 100)) * 9, max_new_tokens=2)
    other.run_to("layers.5.output")
    while True:
        try:
            filler = server.launch(ids, max_new_tokens=2)
            filler.run_to("layers.5.output")
        except errors.OutOfPages as error:
            assert "\n" not in str(error)
            break
    with pytest.raises(errors.OutOfPages) as told:
        sessions[0].continue_()
    assert "\n" not in str(told.value)
    assert sessions[0].status == "stopped"
    for one in server.sessions().index:
        if one not in {s.id for s in sessions}:
            server.attach(one).terminate()
    for session in sessions:
        assert finished(session) == expected
        session.terminate()


def test_sessions_in_a_full_host_pool_come_back(restarts):
    restarts.close()
    restarts.flags = (
        *restarts.flags, "--kv-memory", "512KiB", "--host-memory", "512KiB",
    )  # fmt: skip
    restarts.process = Process(restarts.folder, *restarts.flags)
    restarts.server = server = restarts.process.connect()
    ids = list(range(3, 100)) * 3
    sessions: list[djinn.Session] = []
    with pytest.raises(errors.CapacityError):
        while True:
            sessions.append(server.launch(ids, max_new_tokens=NEXT, temperature=0.8, seed=1))
            sessions[-1].run_to("layers.5.output")
    sessions.pop().terminate()
    restarts.restart()
    ends = []
    for session in sessions:
        ends.append(finished(session))
        session.terminate()
    assert len(ends) > 1 and all(end == ends[0] for end in ends)
    assert ends[0] == finished(server.launch(ids, max_new_tokens=NEXT, temperature=0.8, seed=1))


def test_a_notebook_kernel_that_is_killed_leaves_its_session(restarts):
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        code = (
            f"import djinn_nb; server = djinn_nb.connect({restarts.process.address!r})\n"
            f"session = server.launch({PROMPT!r}, max_new_tokens={NEXT}, name='from a notebook')\n"
            "session.run_to('layers.2.output').edit(scale=1.5)"
        )
        reply = client.execute_interactive(code, timeout=200, output_hook=lambda message: None)
        assert reply["content"]["status"] == "ok", reply["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    session = restarts.server.attach("from a notebook")
    expected = finished(session.fork())
    restarts.restart()
    assert session.stop.location == "layers.2.output" and len(session.edits) == 1
    assert finished(session) == expected
