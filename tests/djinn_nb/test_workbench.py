"""The workbench of a notebook: clicks and cells act on the same objects, snapshots tell of both."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

import djinn_nb as djinn
from djinn_nb import composing, errors, verbs
from djinn_nb.waiting import run_until_rest
from djinn_nb.workbench import Workbench, workbench
from kernel_server.protocol import messages as m
from kernel_server.protocol.snapshot import Notice, Snapshot
from tests.djinn_nb.conftest import NUM_LAYERS, PROMPT, Process
from tests.djinn_nb.held_back import held_back

Holds = Callable[[Snapshot], bool]


@pytest.fixture
def shell(make_shell: Callable[[], InteractiveShell]) -> InteractiveShell:
    return make_shell()


@pytest.fixture
def bench(shell: InteractiveShell) -> Workbench:
    return workbench(shell)


@pytest.fixture
def connected(bench: Workbench, server: djinn.Server) -> Workbench:
    bench.current.bind("server", server)
    return bench


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is slow to reach the layer boundary has a pause answered all the same."""
    monkeypatch.setattr("djinn_nb.workbench.URGENT_S", 60.0)
    monkeypatch.setattr("djinn_nb.workbench.BOUNDARY_S", 60.0)


@pytest.fixture
def soon() -> Callable[[Workbench, Holds], Snapshot]:
    def wait(bench: Workbench, holds: Holds, timeout_s: float = 200.0) -> Snapshot:
        deadline = time.monotonic() + timeout_s
        while not holds(found := bench.snapshot()):
            assert time.monotonic() < deadline, found
            time.sleep(0.01)
        return found

    return wait


def _status(status: str) -> Holds:
    return lambda shown: shown.session is not None and shown.session.status == status


def test_without_a_server_it_says_so_and_offers_to_connect(bench, soon):
    shown = soon(bench, lambda s: s.rev > 0)

    assert (shown.connection, shown.model, shown.session_id) == ("none", None, None)
    assert shown.can == ("connect",)


def test_one_workbench_serves_a_notebook(shell, bench):
    assert workbench(shell) is bench
    assert bench.current is shell.magics_manager.registry["DjinnMagics"]


def test_a_session_launched_by_a_click_is_the_notebooks(connected, shell, soon):
    verbs.perform(connected, "toggle_breakpoint", location=2).result(60)
    stop = verbs.perform(connected, "launch", prompt=PROMPT, max_new_tokens=4).result(60)

    shown = soon(connected, lambda s: _status("stopped")(s) and s.busy is None)
    assert shell.user_ns["stop"] is stop
    assert shell.user_ns["session"].id == shown.session_id
    assert (shown.session.location, shown.session.layer) == ("layers.2.output", 2)
    assert [point.location for point in shown.breakpoints] == ["layers.2.output"]
    assert (shown.selection.layer, shown.selection.token) == (2, shown.session.num_tokens - 1)
    assert shown.actions[-1].code.splitlines()[-1] == "stop = session.continue_()"
    assert shown.actions[-1].outcome == "done"


def test_what_a_cell_does_is_in_the_next_snapshot(connected, shell, soon):
    shell.run_cell(f"session = server.launch({PROMPT!r}, max_new_tokens=4)\n_ = session.run_to(3)")

    shown = soon(connected, lambda s: _status("stopped")(s) and len(s.branches) >= 2)
    assert shown.session.layer == 3
    assert shown.model.num_layers == NUM_LAYERS
    assert [node.current for node in shown.branches].count(True) == 1


def test_a_run_keeps_no_other_action(connected, long_session, soon):
    connected.current.bind("session", long_session)
    running = verbs.perform(connected, "continue")
    soon(connected, _status("running"))

    done = verbs.perform(connected, "set_breakpoint", location="logits", condition="norm < 0")
    done.result(60)
    assert not running.done()
    assert soon(connected, lambda s: s.busy is not None).busy.can_pause

    assert connected.urgent("pause")["ok"]
    stop = running.result(60)
    assert isinstance(stop, djinn.Stopped) and stop.reason == "pause"
    soon(connected, lambda s: _status("stopped")(s) and s.busy is None)


def test_a_pause_reaches_a_run_that_a_cell_waits_for(connected, shell, long_session, soon):
    connected.current.bind("session", long_session)
    cell = threading.Thread(target=shell.run_cell, args=("stop = session.continue_()",))
    cell.start()
    soon(connected, _status("running"))

    answer = connected.urgent("pause")
    cell.join(60)

    assert answer["ok"] and not cell.is_alive()
    assert shell.user_ns["stop"].reason == "pause"  # and not the end of the run
    assert not soon(connected, _status("stopped")).session.taken_over


def test_an_error_is_a_notice_with_the_next_move_and_changes_nothing(connected, session, soon):
    connected.current.bind("session", session)
    session.run_to(2)
    before = session.refresh()

    future = verbs.perform(connected, "go_to", node=99)
    assert isinstance(future.exception(60), errors.UnknownNode)

    shown = soon(connected, lambda s: s.actions and s.actions[-1].outcome == "failed")
    assert shown.notice.code == "UnknownNode" and "99" in shown.notice.text
    assert session.refresh().stop_number == before.stop_number

    verbs.perform(connected, "next").result(60)
    soon(connected, lambda s: s.session.layer == 3 and s.notice is None)


def test_a_stop_taken_over_by_another_client_is_told_and_looked_at_again(
    connected, session, process: Process, soon
):
    connected.current.bind("session", session)
    session.run_to(2)
    connected.notify(Notice(level="info", code="Note", text="a remark of before"))
    with process.connect() as other:
        other.attach(session.id).run_to(4)

    shown = soon(connected, lambda s: s.session is not None and s.session.taken_over)
    assert shown.notice.code == "TakenOver"
    future = verbs.perform(connected, "next")
    assert isinstance(future.exception(60), errors.StaleStop)
    shown = soon(connected, lambda s: s.notice is not None and s.notice.code == "StaleStop")
    assert "Look again" in shown.notice.advice

    verbs.perform(connected, "look").result(60)
    shown = soon(connected, lambda s: not s.session.taken_over and s.notice is None)
    assert shown.session.layer == 4
    assert shown.selection.layer == 4


def test_a_control_call_on_its_way_is_no_takeover(session, monkeypatch):
    asked: list[bool] = []

    def asking(*args: Any, **options: Any) -> m.SessionInfo:
        asked.append(session.is_taken_over)
        try:
            return run_until_rest(*args, **options)
        finally:
            asked.append(session.is_taken_over)

    monkeypatch.setattr("djinn_nb.session.run_until_rest", asking)
    session.run_to(2)
    with pytest.raises(errors.UnknownNode):
        session.go_to(99)

    assert asked == [False] * 4


def test_a_session_terminated_elsewhere_leaves_the_list(connected, session, process, soon):
    connected.current.bind("session", session)
    session.run_to(2)
    soon(connected, _status("stopped"))
    with process.connect() as other:
        other.attach(session.id).terminate()

    shown = soon(connected, lambda s: s.session_id is None)
    assert session._id not in [one.id for one in shown.sessions]


def test_a_server_that_is_lost_is_told_and_so_is_what_to_do(model_folder, bench, tmp_path, soon):
    process = Process(tmp_path / "run", "--model", str(model_folder))
    try:
        server = process.connect()
        bench.current.bind("server", server)
        bench.current.bind("session", server.launch(PROMPT, max_new_tokens=4))
        bench.current.session.run_to(1)
        soon(bench, _status("stopped"))

        process.process.kill()
        shown = soon(bench, lambda s: s.connection == "lost")

        assert shown.notice is not None and shown.notice.advice
        assert shown.can == ("connect",)
        assert shown.session.location == "layers.1.output"  # as it was last seen
        server.close()
    finally:
        process.end()


def test_a_wrong_access_token_is_denied(bench, process, soon):
    future = verbs.perform(bench, "connect", address=process.address, token="wrong")

    assert isinstance(future.exception(60), errors.AccessDenied)
    shown = soon(bench, lambda s: s.connection == "denied")
    assert shown.notice.code == "AccessDenied" and "token" in shown.notice.advice
    assert "wrong" not in "".join(action.code for action in shown.actions)


def test_a_wrong_token_in_a_cell_is_denied_until_another_server_is_there(
    bench, shell, process, server, soon
):
    shell.run_cell(f"%djinn_connect {process.address} --token wrong")

    shown = soon(bench, lambda s: s.connection == "denied")
    assert shown.address == process.address  # so that a view can ask for its token alone
    assert "does not know this access token" in shown.notice.text
    assert "--token TOKEN" in shown.notice.advice
    assert shown.can == ("connect",)

    shell.user_ns["server"] = server  # in Python, past magics and views
    shell.run_cell("pass")
    assert soon(bench, lambda s: s.connection == "ready").notice is None


def test_a_session_that_a_cell_waits_for_says_that_clicks_wait_too(
    connected, shell, long_session, soon, monkeypatch
):
    monkeypatch.setattr(composing, "LONG_CELL_S", 0.0)
    connected.current.bind("session", long_session)
    cell = threading.Thread(target=shell.run_cell, args=("stop = session.continue_()",))
    cell.start()

    shown = soon(connected, lambda s: s.busy is not None and s.busy.in_cell)
    assert shown.busy.can_pause and shown.session.status == "running"

    assert connected.urgent("pause")["ok"]
    cell.join(60)
    soon(connected, lambda s: s.busy is None)
    running = verbs.perform(connected, "continue")  # by a click: nothing waits for a cell
    shown = soon(connected, lambda s: _status("running")(s) and s.busy is not None)
    assert shown.busy.can_pause and not shown.busy.in_cell
    connected.urgent("pause")
    running.result(60)


def test_an_address_with_no_server_is_told(bench, tmp_path, soon):
    future = verbs.perform(bench, "connect", address=f"unix:{tmp_path / 'none.sock'}")

    assert isinstance(future.exception(60), errors.NoServer)
    shown = soon(bench, lambda s: s.notice is not None and s.notice.level == "error")
    assert (shown.connection, shown.notice.code) == ("none", "NoServer")


def test_of_questions_of_one_kind_the_newest_is_answered(bench):
    begun, go_on, told = threading.Event(), threading.Event(), []

    def first() -> str:
        begun.set()
        assert go_on.wait(60)
        return "first"

    bench.ask("preview", first, lambda answer, error: told.append((answer, error)))
    assert begun.wait(60)
    for n in range(20):
        bench.ask("preview", lambda n=n: n, lambda answer, error: told.append((answer, error)))
    finished = threading.Event()
    bench.ask("other", lambda: 1 / 0, lambda answer, error: (told.append(error), finished.set()))
    go_on.set()

    assert finished.wait(60)
    assert told[:2] == [("first", None), (19, None)]
    assert isinstance(told[2], ZeroDivisionError) and len(told) == 3


def test_subscribers_get_newer_snapshots_only_and_one_that_breaks_stops_no_other(
    connected, soon, eventually
):
    seen: list[int] = []

    def broken(shown: Snapshot) -> None:
        raise RuntimeError("a view of somebody's")

    ends = [connected.subscribe(broken), connected.subscribe(lambda s: seen.append(s.rev))]
    for layer in (1, 2, 3):
        connected.select(layer=layer)
        shown = soon(connected, lambda s, layer=layer: s.selection.layer == layer)
        eventually(lambda rev=shown.rev: bool(seen) and seen[-1] >= rev)
    for end in ends:
        end()

    assert seen == sorted(set(seen)) and len(seen) >= 3


@pytest.mark.parametrize(
    ("wish", "error"),
    [({"layer": NUM_LAYERS}, "layer 6"), ({"layer": -1}, "whole number"), ({"head": 4}, "head 4"),
     ({"token": 10_000}, "token 10000"), ({"token": True}, "whole number")],
)  # fmt: skip
def test_a_selection_of_what_is_not_there_is_refused(connected, session, soon, wish: Any, error):
    connected.current.bind("session", session)
    session.run_to(2)
    before = soon(connected, _status("stopped")).selection

    with pytest.raises(errors.BadArgument, match=error):
        connected.select(**wish)
    assert connected.selection == before


# -- who waits for whom ---------------------------------------------------------------------------


def test_an_urgent_call_passes_a_busy_worker_an_asker_and_a_long_answer(
    connected, long_session, soon
):
    connected.current.bind("session", long_session)
    running = verbs.perform(connected, "continue")
    soon(connected, _status("running"))
    gate = threading.Event()
    connected.do("slow", "pass", gate.wait)
    connected.ask("slow", gate.wait, lambda *_: None)
    # the connection of ordinary calls is kept waiting too
    control = long_session.client.transport._control
    control.calls.put(_Holding(gate))

    answer = connected.urgent("pause")
    gate.set()  # until then all of them were kept waiting

    assert answer["status"] == "stopped" and answer["location"]
    assert running.result(60).reason == "pause"


class _Holding:
    """A call that keeps the thread of its connection until a gate opens."""

    def __init__(self, gate: threading.Event) -> None:
        self._gate = gate

    @property
    def abandoned(self) -> bool:
        self._gate.wait(200)  # longer than the test may take
        return True


def test_snapshots_come_while_the_server_is_kept_busy(connected, session, soon):
    connected.current.bind("session", session)
    session.run_to(2)
    soon(connected, _status("stopped"))
    gate = threading.Event()
    session.client.transport._control.calls.put(_Holding(gate))
    connected.reader.forget_branches()

    connected.select(layer=1)

    soon(connected, lambda s: s.selection.layer == 1)
    gate.set()  # until then the server was kept busy


def test_an_interrupted_cell_leaves_a_run_whose_stop_is_bound_when_it_comes(
    connected, shell, long_session, soon, eventually
):
    connected.current.bind("session", long_session)

    def interrupt() -> None:
        soon(connected, _status("running"))
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    done = shell.run_cell("stop = session.continue_()")
    interrupting.join()
    assert isinstance(done.error_in_exec, KeyboardInterrupt)

    shown = soon(connected, _status("running"))
    assert not shown.session.taken_over and shown.busy.can_pause
    assert connected.urgent("pause")["status"] == "stopped"

    eventually(lambda: shell.user_ns.get("stop") is not None)
    assert shell.user_ns["stop"].reason == "pause"
    shown = soon(connected, lambda s: _status("stopped")(s) and s.busy is None)
    assert shown.notice is None and not shown.session.taken_over
    assert verbs.perform(connected, "next").result(60).reason == "step"


def test_a_run_of_another_client_is_told_while_it_runs(connected, long_session, process, soon):
    connected.current.bind("session", long_session)
    with process.connect() as other:
        theirs = other.attach(long_session.id)
        other.client.control(m.Continue(session_id=theirs.id, seen=theirs.seen))
        shown = soon(connected, lambda s: s.session is not None and s.session.taken_over)
        theirs.pause()

    assert shown.notice.code == "TakenOver" and "running" in shown.notice.text
    assert "look" in shown.can and "continue" not in shown.can


# -- states of the server -------------------------------------------------------------------------


def test_a_session_terminated_elsewhere_says_so(connected, session, process, soon):
    connected.current.bind("session", session)
    session.run_to(2)
    soon(connected, _status("stopped"))
    with process.connect() as other:
        other.attach(session.id).terminate()

    shown = soon(connected, lambda s: s.session_id is None and s.notice is not None)
    assert shown.notice.code == "Terminated" and "another client" in shown.notice.text
    assert "launch" in shown.can and "next" not in shown.can


def test_a_loading_model_shows_how_far_it_is(bench, model_folder, tmp_path, soon, eventually):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    seen: list[Snapshot] = []
    bench.subscribe(seen.append)
    with held_back(folder / "config.json") as held:
        process = Process(tmp_path / "run", "--model", str(folder))
        try:
            eventually(held.is_read)
            connecting = verbs.perform(bench, "connect", address=process.address)
            soon(bench, lambda s: s.connection == "loading" and s.progress.done is not None)
            assert not connecting.done()

            held.give()
            connecting.result(120)

            assert soon(bench, lambda s: s.connection == "ready").notice is None
            loading = [shown for shown in seen if shown.connection == "loading"]
            assert all(shown.can == () for shown in loading)
            bench.current.server.close()
        finally:
            process.end()


@pytest.mark.slow
@pytest.mark.parametrize("journal", [True, False])
def test_a_server_that_was_lost_is_followed_by_another(
    journal, model_folder, bench, tmp_path, soon
):
    options = () if journal else ("--no-journal",)
    first = Process(tmp_path / "run", "--model", str(model_folder), *options)
    try:
        bench.current.use_server(first.connect())
        bench.current.bind("session", bench.current.server.launch(PROMPT, max_new_tokens=4))
        bench.current.session.run_to(1)
        soon(bench, _status("stopped"))
        first.process.kill()
        first.process.wait()
        soon(bench, lambda s: s.connection == "lost")
        assert isinstance(verbs.perform(bench, "next").exception(60), errors.ConnectionFailed)
    finally:
        first.end()
    second = Process(tmp_path / "run", "--model", str(model_folder), *options)
    try:
        second.connect().close()
        # what a snapshot tells of the second server is read bit by bit: the branches last
        told: Holds = lambda s: bool(s.branches) if journal else s.notice is not None  # noqa: E731
        shown = soon(bench, lambda s: s.connection == "ready" and told(s))

        if journal:
            assert (shown.session_id, shown.notice) == ("s1", None)
            assert (shown.session.location, shown.branches[-1].current) == ("layers.1.output", True)
            verbs.perform(bench, "next").result(60)
            soon(bench, lambda s: s.session.layer == 2 and s.notice is None)
            return
        assert (shown.session_id, shown.notice.code) == (None, "ServerReplaced")
        verbs.perform(bench, "launch", prompt="Mary", max_new_tokens=2).result(60)
        soon(bench, lambda s: _status("finished")(s) and s.notice is None)
    finally:
        second.end()


def test_a_connection_that_breaks_and_stands_again_goes_on(connected, session, soon, eventually):
    connected.current.bind("session", session)
    session.run_to(2)
    for line in session.client.transport._lines.values():
        line.interrupt()

    eventually(lambda: session.client.transport.traffic["events"].connects == 2)
    soon(connected, lambda s: s.connection == "ready")
    assert verbs.perform(connected, "next").result(60).location == "layers.3.output"


def test_a_click_on_a_session_that_is_no_longer_shown_is_dropped(connected, session, soon):
    connected.current.bind("session", session)
    session.run_to(2)
    before = soon(connected, _status("stopped")).selection

    connected.select(session="s999", token=0)

    assert connected.selection == before


def test_closing_ends_the_threads(bench):
    threads = list(bench._threads)

    bench.close()

    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
