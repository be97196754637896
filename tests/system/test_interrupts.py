"""Ctrl-C at any moment ends the waiting and nothing else; deadlines and pauses likewise."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

import djinn_nb as djinn
from djinn_nb import client as client_module
from djinn_nb import edits as edits_module
from djinn_nb import errors
from djinn_nb.waiting import Interrupted
from tests.djinn_nb.conftest import HIDDEN, LONG, NUM_LAYERS
from tests.system.conftest import PROMPT

#: What an interrupt's message may say, and the statuses it may then be found in. A session that
#: runs may have come to rest since.
SAYS = {
    "still runs on the server": {"running", "finished"},
    "was not started": {"waiting"},
    "is finished": {"finished"},
    "is stopped": {"stopped"},
}


@contextmanager
def interrupted_after(delay_s: float):
    """A real SIGINT to this process, unless the work is done before."""
    done = threading.Event()

    def send() -> None:
        if not done.wait(delay_s):
            os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        done.set()
        sender.join()


def until_interrupted() -> None:
    """What is done is done; the interrupt is still to come, and here it comes."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        time.sleep(0.01)
    raise AssertionError("no interrupt came")


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message of an interrupt says how the session is, however late the server tells it."""
    monkeypatch.setattr("djinn_nb.waiting.ASK_S", 60.0)


def until(holds) -> None:
    deadline = time.monotonic() + 200
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.002)


def require_no_transfer(world) -> None:
    """What was interrupted is closed on the server too, soon."""
    until(lambda: not world.server.memory().loc["transfers", "bytes"])


def test_interrupts_while_launching_and_running_lose_no_session(world, canary):
    rng = random.Random(0)
    expected = world.launch(max_new_tokens=30).continue_().tokens
    outcomes: list[str] = []
    for index in range(40):
        session = None
        try:
            with interrupted_after(rng.random() ** 2 * 0.1):
                session = world.launch(max_new_tokens=30, name=f"run {index}")
                session.continue_()
                until_interrupted()
        except KeyboardInterrupt as told:
            outcomes.append(str(told))
            status = None if session is None else session.status
            claims = [SAYS[words] for words in SAYS if words in str(told)]
            assert session is None or not claims or status in claims[0], (str(told), status)
        if session is None:
            # the handle is lost, the session is not
            found = [i for i in world.infos() if i.name == f"run {index}"]
            session = world.server.attach(found[0].id) if found else None
        if session is not None:
            waits = session.status == "waiting"
            end = session.continue_() if waits else session.wait()
            assert end.tokens == expected
            session.terminate()

    assert len(outcomes) == 40


def test_interrupts_of_a_run_say_that_it_still_runs_and_change_nothing(world, canary):
    expected = world.launch(max_new_tokens=30).continue_().tokens
    session = world.launch(max_new_tokens=LONG)
    rng = random.Random(0)

    def send() -> None:
        # once the call is under way, however slow this machine is; then at any moment
        until(lambda: session.client.mirror.is_waited_for(session.id))
        until(lambda: session.newest.status == "running")
        time.sleep(rng.random() ** 2 * 0.1)
        os.kill(os.getpid(), signal.SIGINT)

    for index in range(10):
        sender = threading.Thread(target=send)
        with pytest.raises(Interrupted, match="still runs on the server"):
            sender.start()
            session.wait() if index else session.continue_()
        sender.join()
        assert session.status == "running"

    until(lambda: len(session.refresh().tokens) >= len(expected))
    session.pause()
    assert session.tokens[: len(expected)] == expected


def test_the_message_is_right_when_the_interrupt_beats_the_answer(world, monkeypatch):
    session = world.launch(max_new_tokens=2000)
    control = session.client.control

    def slow(message):
        answer = control(message)
        raise KeyboardInterrupt if answer else AssertionError

    monkeypatch.setattr(session.client, "control", slow)
    with pytest.raises(Interrupted, match=r"still runs.*session\.wait\(\).*session\.pause\(\)"):
        session.continue_()
    monkeypatch.undo()

    assert session.pause().reason == "pause"
    session.terminate()


def test_interrupts_while_a_tensor_is_fetched_leave_the_stop_readable(world, canary, monkeypatch):
    monkeypatch.setattr(client_module, "CHUNK_BYTES", 4096)
    session = world.launch([1, 2, 3] * 500, max_new_tokens=2)
    stop = session.run_to(3)
    whole = stop.hidden_states.numpy()
    rng = random.Random(1)
    interrupted = 0
    for _ in range(30):
        stop.session.client.mirror.values_changed(session.id)  # read before counts no more
        try:
            with interrupted_after(rng.random() * 0.04):
                stop.hidden_states.numpy()
                until_interrupted()
        except KeyboardInterrupt:
            interrupted += 1
    session.client.mirror.values_changed(session.id)

    np.testing.assert_array_equal(stop.hidden_states.numpy(), whole)
    assert interrupted == 30
    assert whole.shape == (1500, HIDDEN)
    require_no_transfer(world)


def test_interrupts_while_a_tensor_is_sent_change_nothing_or_all(world, canary, monkeypatch):
    monkeypatch.setattr(client_module, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(edits_module, "CHUNK_BYTES", 4096)
    stop = world.launch([1, 2, 3] * 500, max_new_tokens=2).run_to(3)
    before = stop.hidden_states.numpy()
    value = np.full((1500, HIDDEN), 0.5, np.float32)
    rng = random.Random(2)
    for _ in range(12):
        edit = None
        try:
            with interrupted_after(rng.random() * 0.06):
                edit = stop.edit(set=value)
        except KeyboardInterrupt:
            pass
        edits = stop.session.edits
        values = stop.hidden_states.numpy()
        np.testing.assert_array_equal(values, value if edits else before)
        if edits:
            edits[0].undo()

    np.testing.assert_array_equal(stop.hidden_states.numpy(), before)
    assert edit is None or edit.id
    require_no_transfer(world)


def test_a_deadline_leaves_the_session_running_and_wait_gets_its_stop(world, canary):
    session = world.launch(max_new_tokens=LONG)

    with pytest.raises(errors.StillRunning, match=r"session\.wait\(\).*session\.pause\(\)"):
        session.continue_(timeout=0.01)
    with pytest.raises(errors.StillRunning):
        session.wait(timeout=np.float64(0))
    with pytest.raises(errors.NotStopped):
        session.next()
    session.break_at(1, when="decode")
    stop = session.wait()

    assert (stop.location, stop.reason) == ("layers.1.output", "breakpoint")
    assert stop.forward == len(session.tokens) - session.newest.num_prompt_tokens > 0


@pytest.mark.parametrize("who", ["thread", "client"])
def test_a_pause_from_elsewhere_stops_at_the_next_layer(world, canary, who):
    session = world.launch(max_new_tokens=LONG)

    def pause() -> None:
        until(lambda: session.newest.status == "running")
        time.sleep(0.2)
        if who == "thread":
            session.pause()
        else:
            with world.connect() as other:
                other.attach(session.id).pause()

    pausing = threading.Thread(target=pause)
    pausing.start()
    stop = session.continue_()
    pausing.join()

    assert stop.reason == "pause"
    assert re.fullmatch(r"embedding|layers\.\d+\.output|final_norm|logits", stop.location)
    index = re.search(r"\d+", stop.location)
    if index:
        assert stop.layers_executed == int(index[0]) + 1 <= NUM_LAYERS
    reference = world.launch(max_new_tokens=stop.forward + 4)
    end = reference.continue_()
    session.run_to("logits")
    while len(session.tokens) < len(end.tokens):
        session.run_to("logits")
    assert session.tokens[: len(end.tokens)] == end.tokens


def test_a_prefill_is_paused_at_a_layer_boundary(world, canary):
    def pause() -> None:
        until(lambda: session.newest.status == "running")
        session.pause()

    # 250 chunks of 8 tokens in each of six layers, and more where the pause comes after the end
    for length in (500, 1000, 2000, 4000):
        prompt = [1, 2, 3, 4] * length
        session = world.launch(prompt, max_new_tokens=2)
        pausing = threading.Thread(target=pause)
        pausing.start()
        stop = session.continue_()
        pausing.join()
        if isinstance(stop, djinn.Stopped) and stop.forward == 0:
            break
        session.terminate()

    assert (stop.reason, stop.forward) == ("pause", 0)
    assert stop.hidden_states.shape == (len(prompt), HIDDEN)
    expected = world.launch(prompt, max_new_tokens=2).continue_().tokens
    assert session.continue_().tokens == expected


def test_two_interrupts_in_a_row_are_no_worse_than_one(world, canary):
    session = world.launch(max_new_tokens=300)
    expected = session.fork().continue_().tokens
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt), interrupted_after(0.02), interrupted_after(0.021):
            session.wait() if session.status == "running" else session.continue_()
            until_interrupted()
        if session.status == "finished":
            break

    assert session.wait().tokens == expected
    assert isinstance(session.stop, djinn.Stopped | None)
    assert PROMPT in session.text
