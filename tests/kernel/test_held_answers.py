"""A request that makes a session run may be answered where it rests: one message for both."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from djinn_nb import Session, errors, waiting
from kernel_server import gateway as gateway_module
from kernel_server.gateway import MAX_HELD_S
from kernel_server.protocol import codec
from kernel_server.protocol import messages as m
from notebooks.harness.faults import instead
from notebooks.harness.inprocess import OWNER, Local, local_kernel
from tests.djinn_nb.conftest import LONG, make_model
from tests.kernel.tier_cases import wait_until


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    folder = tmp_path_factory.mktemp("kernel")
    with local_kernel(
        model=make_model(folder / "tiny", tokenizer=False), dtype="float32", device="cpu",
        prefill_chunk=16, kv_memory_bytes=32 << 20, state_dir=folder / "journal",
    ) as made:  # fmt: skip
        yield made


@pytest.fixture
def session(local: Local) -> Iterator[Session]:
    made = local.server.launch(list(range(5, 15)), max_new_tokens=8)
    made.run_to(0)
    yield made
    made.terminate()


def ask(local: Local, message: Any) -> Any:
    return codec.decode(local.kernel.gateway.handle(OWNER, "here", codec.encode(message)))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine, an answer is held until the session rests."""
    monkeypatch.setattr(gateway_module, "MAX_HELD_S", 120.0)
    monkeypatch.setattr(waiting, "HELD_S", 120.0)


RUNS: list[tuple[type, dict[str, Any]]] = [
    (m.Continue, {}), (m.Next, {}), (m.StepIn, {}), (m.StepOut, {}),
    (m.RunTo, {"location": "layers.1.output"}),
]  # fmt: skip


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(("kind", "given"), RUNS, ids=[kind.__name__ for kind, _ in RUNS])
def test_an_answer_that_is_held_says_where_the_session_rests(local, session, kind, given) -> None:
    message = kind(session_id=session.id, seen=session.seen, wait_s=100.0, **given)
    answer = ask(local, message)
    described = ask(local, m.Describe(session_id=session.id))

    assert answer.session.status in ("stopped", "finished")
    assert answer.session.stop_number == described.session.stop_number
    assert (answer.session.location, answer.session.tokens, answer.session.stop) == (
        described.session.location, described.session.tokens, described.session.stop
    )  # fmt: skip


@pytest.mark.usefixtures("patient")
def test_going_back_is_answered_with_where_it_led(local, session) -> None:
    first = session.newest.stop
    session.run_to(1)
    for message in (
        m.StepBack(session_id=session.id, seen=session.seen, wait_s=100.0),
        m.Rewind(
            session_id=session.id, seen=session.seen + 1, forward=0, location="layers.0.output",
            wait_s=100.0,
        ),
    ):  # fmt: skip
        answer = ask(local, message)
        assert answer.session.stop.location == first.location, answer


def test_without_a_wait_the_answer_is_that_it_runs(local) -> None:
    session = local.server.launch(list(range(5, 25)), max_new_tokens=LONG)
    answer = ask(local, m.Continue(session_id=session.id, seen=session.seen))

    assert answer.session.status == "running"
    session.terminate()


def test_a_run_that_goes_on_is_answered_as_running_when_the_wait_is_over(local) -> None:
    session = local.server.launch(list(range(5, 25)), max_new_tokens=LONG)
    answer = ask(local, m.Continue(session_id=session.id, seen=session.seen, wait_s=0.01))

    assert answer.session.status == "running"
    assert not local.kernel.loop.events._of(OWNER).awaited
    session.terminate()


@pytest.mark.parametrize("wait_s", [math.inf, 1e9, math.nan, -1.0])
def test_a_wait_is_bounded_and_nonsense_is_none(local, session, wait_s) -> None:
    asked = list[float]()

    def note(owner: str, session_id: str, after: int, timeout_s: float) -> None:
        asked.append(timeout_s)

    message = m.RunTo(
        session_id=session.id, seen=session.seen, location="layers.1.output", wait_s=wait_s
    )
    with instead(local.kernel.gateway.events, "rest", note):
        assert ask(local, message).session.status == "running"
    assert asked == ([MAX_HELD_S] if wait_s > 1 else [])
    session.wait()


def test_a_refused_request_is_refused_at_once(local, session) -> None:
    answer = ask(local, m.Next(session_id=session.id, seen=session.seen + 7, wait_s=100.0))

    assert answer.error.code == "StaleStop"


def test_while_an_answer_is_held_the_owner_is_answered_otherwise(local, session) -> None:
    """The gate that keeps an owner to one call at a time is not held meanwhile."""
    held, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        held.set()
        assert go_on.wait(60)

    message = m.RunTo(
        session_id=session.id, seen=session.seen, location="layers.1.output", wait_s=0.2
    )
    with instead(local.kernel.gateway.events, "rest", wait):
        asker = threading.Thread(target=ask, args=(local, message))
        asker.start()
        assert held.wait(60)
        answers = [ask(local, m.Describe(session_id=session.id)) for _ in range(3)]
        assert asker.is_alive()
        go_on.set()
        asker.join(60)
    assert all(isinstance(answer, m.SessionReply) for answer in answers)
    session.wait()


@pytest.mark.usefixtures("patient")
def test_a_client_needs_no_event_to_be_told_of_a_stop(local, session) -> None:
    events = local.kernel.gateway.events
    go_on = threading.Event()
    poll = events.poll

    def late(*given: Any) -> Any:
        assert go_on.wait(120)
        return poll(*given)

    with instead(events, "poll", late):
        # a poll that began before is answered by an event that nobody was told of
        other = local.server.launch(list(range(5, 15)), max_new_tokens=8)
        stop = session.run_to(1)
        assert stop.location == "layers.1.output" and session.newest.status == "stopped"
        assert session.next().location == "layers.2.output"
        go_on.set()
    assert session.continue_().session.status == "finished"
    other.terminate()


@pytest.mark.usefixtures("patient")
def test_a_session_terminated_while_its_answer_is_held_is_told_as_gone(local) -> None:
    session = local.server.launch(list(range(5, 25)), max_new_tokens=LONG)
    found = list[BaseException]()

    def run() -> None:
        try:
            session.continue_()
        except errors.DjinnError as error:
            found.append(error)

    runner = threading.Thread(target=run)
    runner.start()
    awaited = local.kernel.loop.events._of(OWNER).awaited
    wait_until(lambda: session.id in awaited)
    ask(local, m.Terminate(session_id=session.id))
    runner.join(60)

    assert [type(error) for error in found] == [errors.UnknownSession]


@pytest.mark.usefixtures("patient")
def test_what_led_to_a_stop_is_told_once_it_is_asked_for(local, session) -> None:
    """Events may come later than the answer: who asks for what they say waits for them."""
    client = session.client
    session.run_to(1)
    seen = session.newest.event_seq
    client.catch_up()

    assert client.mirror.heard_seq >= seen
