"""Running, stepping, stopping and ending sessions, through the public API, on a real server."""

from __future__ import annotations

import _thread
import threading
import time

import numpy as np
import pytest

import djinn_nb as djinn
from djinn_nb import errors
from djinn_nb.planned import PLANNED
from djinn_nb.waiting import Interrupted
from tests.djinn_nb.conftest import CONTEXT, NUM_LAYERS, PROMPT, VOCABULARY, Process


def test_a_session_stops_where_it_was_told_and_finishes(server):
    session = server.launch(PROMPT, max_new_tokens=6)
    session.break_at(3, when="prefill")

    stop = session.continue_()
    end = session.continue_()

    assert isinstance(stop, djinn.Stopped)
    assert (stop.location, stop.reason, stop.forward) == ("layers.3.output", "breakpoint", 0)
    assert stop.layers_executed == 4
    assert isinstance(end, djinn.Finished)
    assert end.finish_reason == "max_new_tokens"
    assert session.tokens == end.tokens
    assert len(end.generated_tokens) == 6
    assert session.status == "finished"


def test_the_exact_prompt_ids_are_shown(session, server):
    ids = server.model.tokenizer.encode(PROMPT)

    assert session.tokens == ids
    assert str(ids) in repr(session)


def test_text_and_ids_make_the_same_session(server):
    ids = server.model.tokenizer.encode(PROMPT)

    by_text = server.launch(PROMPT, max_new_tokens=3).continue_()
    by_ids = server.launch(np.array(ids), max_new_tokens=3).continue_()

    assert by_text.tokens == by_ids.tokens
    assert by_text.text == by_ids.text == server.model.tokenizer.decode(by_ids.tokens)


def test_next_goes_layer_by_layer_to_the_next_forward(session):
    session.run_to("embedding")

    places = [session.next() for _ in range(NUM_LAYERS + 3)]

    expected = [f"layers.{i}.output" for i in range(NUM_LAYERS)] + ["final_norm", "logits"]
    assert [stop.location for stop in places] == [*expected, "layers.0.output"]
    assert [stop.forward for stop in places] == [0] * (NUM_LAYERS + 2) + [1]
    assert {stop.reason for stop in places} == {"step"}


def test_step_out_stops_before_sampling(session):
    before = len(session.tokens)

    stop = session.step_out()

    assert stop.location == "logits"
    assert stop.value.shape == (1, VOCABULARY)
    assert len(session.tokens) == before
    with pytest.raises(errors.NotSupported, match=r"stop\.value"):
        stop.hidden_states  # noqa: B018


def test_logits_are_none_before_the_first_forward_and_then_those_sampled_from(session):
    assert session.logits is None

    shown = session.step_out().value.numpy()[0]
    session.next()

    assert session.logits.dtype == np.float32
    assert session.logits.shape == (VOCABULARY,)
    np.testing.assert_array_equal(session.logits, shown)
    assert session.tokens[-1] == int(shown.argmax())


def test_layers_executed_counts_the_current_forward(session):
    assert session.layers_executed == 0

    session.run_to("layers.2.input")

    assert session.layers_executed == 2


def test_stop_on_entry_stops_after_the_embedding(server):
    session = server.launch(PROMPT, max_new_tokens=2, stop_on_entry=True)

    assert session.status == "stopped"
    assert (session.stop.location, session.stop.reason) == ("embedding", "entry")


def test_a_fork_goes_its_own_way_and_leaves_the_parent(session):
    stop = session.run_to(2)
    child = session.fork()
    child.stop.edit(zero=True)

    ended = child.continue_()

    assert child.parent == session.id
    assert session.status == "stopped"
    untouched = session.continue_()
    assert untouched.tokens != ended.tokens or not np.array_equal(session.logits, child.logits)
    assert stop.location == "layers.2.output"


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(server):
    def sampled(seed: int) -> list[int]:
        made = server.launch(PROMPT, max_new_tokens=12, temperature=1.5, seed=seed)
        return made.continue_().tokens

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_pause_stops_a_running_generation(long_session, eventually):
    with pytest.raises(errors.StillRunning, match=r"session\.wait\(\).*session\.pause\(\)"):
        long_session.continue_(timeout=0.2)
    assert long_session.status == "running"

    stop = long_session.pause()

    assert stop.reason == "pause"
    assert long_session.status == "stopped"
    assert long_session.stop is stop


def test_wait_returns_what_a_run_ends_in(server):
    session = server.launch(PROMPT, max_new_tokens=400)
    with pytest.raises(errors.StillRunning):
        session.continue_(timeout=0)

    end = session.wait()

    assert isinstance(end, djinn.Finished)


def test_waiting_for_a_session_that_was_never_started_is_refused(session):
    with pytest.raises(errors.NotStopped, match="continue_"):
        session.wait()


def test_an_interrupt_ends_the_waiting_only(long_session, eventually, monkeypatch):
    # the message says how the session is, however late the server tells it
    monkeypatch.setattr("djinn_nb.waiting.ASK_S", 60.0)

    def interrupt() -> None:
        eventually(lambda: long_session.newest.status == "running")
        _thread.interrupt_main()

    interrupting = threading.Thread(target=interrupt)
    with pytest.raises(Interrupted, match=r"still runs on the server.*session\.wait\(\)"):
        interrupting.start()
        long_session.continue_()
    interrupting.join()

    assert long_session.status == "running"
    stop = long_session.pause()
    assert stop.reason == "pause"
    assert long_session.next().number == stop.number + 1


def test_interrupts_at_any_moment_leave_session_and_connection_usable(server):
    for delay_ms in (0, 1, 2, 3, 5, 8, 13):
        session = server.launch(PROMPT, max_new_tokens=300)
        timer = threading.Timer(delay_ms / 1000, _thread.interrupt_main)
        try:
            timer.start()
            session.continue_()
            timer.join()
            time.sleep(0.05)
        except KeyboardInterrupt:
            pass
        timer.join()
        if session.status == "waiting":  # interrupted before the request was sent
            session.continue_()

        assert isinstance(session.wait(), djinn.Finished)


def test_the_slower_of_two_clients_gets_stale_stop_and_can_catch_up(session, process: Process):
    session.run_to(1)
    with djinn.connect(process.address) as other_server:
        other = other_server.attach(session.id)
        other.next()

        with pytest.raises(errors.StaleStop):
            session.next()

        assert session.stop.location == "layers.2.output"
        assert session.next().location == "layers.3.output"


def test_a_stop_that_has_passed_refuses_to_be_read_or_edited(session):
    stop = session.run_to(1)
    session.next()

    with pytest.raises(errors.StaleStop):
        stop.hidden_states.numpy()
    with pytest.raises(errors.StaleStop):
        stop.edit(scale=2)
    assert "layers.1.output" in repr(stop)


def test_sessions_outlive_their_client(session, process: Process):
    session.run_to(2)
    expected = session.fork().continue_().tokens

    with djinn.connect(process.address) as later:
        found = later.attach(session.id)

        assert found.stop.location == "layers.2.output"
        assert found.continue_().tokens == expected


def test_a_terminated_session_is_gone(session, server):
    session.run_to(1)

    session.terminate()

    assert "terminated" in repr(session)
    assert session.id not in server.sessions().index
    with pytest.raises(errors.UnknownSession):
        session.continue_()


def test_whoever_waits_for_a_session_that_is_terminated_is_told(
    long_session, process: Process, eventually
):
    def end_it() -> None:
        eventually(lambda: long_session.newest.status == "running")
        with djinn.connect(process.address) as other:
            other.attach(long_session.id).terminate()

    ending = threading.Thread(target=end_it)
    ending.start()

    with pytest.raises(errors.UnknownSession):
        long_session.continue_()
    ending.join()


def test_the_story_tells_what_happened(session):
    session.run_to(1)

    story = session.story()

    assert any("RunTo" in line for line in story)
    assert repr(story) == "\n".join(story)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda s: s.break_at(99), errors.UnknownLocation),
        (lambda s: s.break_at("layers.3.nose"), errors.UnknownLocation),
        (lambda s: s.break_at(None), errors.UnknownLocation),
        (lambda s: s.break_at(True), errors.UnknownLocation),
        (lambda s: s.break_at("blocks.3.mlp.hook_pre"), errors.NotSupported),
        (lambda s: s.break_at(1, when="sometimes"), errors.BadArgument),
        (lambda s: s.break_at(1, ignore=-1), errors.BadArgument),
        (lambda s: s.break_at(1, condition="__import__('os')"), errors.BadCondition),
        (lambda s: s.break_at(1, condition="norm >"), errors.BadCondition),
        (lambda s: s.break_at(1, condition=7), errors.BadArgument),
        (lambda s: s.run_to("nowhere"), errors.UnknownLocation),
        (lambda s: s.continue_(timeout="soon"), errors.BadArgument),
        (lambda s: s.fork(seed="x"), errors.BadArgument),
    ],
)
def test_bad_input_is_refused_by_name_and_changes_nothing(session, call, error):
    before = session.refresh()

    with pytest.raises(error) as caught:
        call(session)

    assert session.refresh() == before
    # a condition's message points at the mistake with a caret below it
    assert "\n" not in str(caught.value) or error is errors.BadCondition


@pytest.mark.parametrize(
    ("prompt", "wishes", "error"),
    [
        ("", {}, errors.BadPrompt),
        ([], {}, errors.BadPrompt),
        ([VOCABULARY], {}, errors.BadPrompt),
        ([-1], {}, errors.BadPrompt),
        ([1.5], {}, errors.BadPrompt),
        (None, {}, errors.BadPrompt),
        ([1] * (CONTEXT + 1), {}, errors.PromptTooLong),
        ([1], {"max_new_tokens": 100_000}, errors.PromptTooLong),
        ([1], {"max_new_tokens": 0}, errors.BadArgument),
        ([1], {"max_new_tokens": "many"}, errors.BadArgument),
        ([1], {"temperature": -1}, errors.BadArgument),
        ([1], {"temperature": float("nan")}, errors.BadArgument),
        ([1], {"top_p": 0}, errors.BadArgument),
        ([1], {"seed": 1.5}, errors.BadArgument),
        ([1], {"name": 7}, errors.BadArgument),
    ],
)
def test_a_bad_launch_leaves_no_session(server, prompt, wishes, error):
    with pytest.raises(error) as caught:
        server.launch(prompt, **({"max_new_tokens": 4} | wishes))

    assert "\n" not in str(caught.value)
    assert server.sessions().empty


def test_planned_names_say_so_and_misspelt_ones_are_attribute_errors(session, server, monkeypatch):
    monkeypatch.setitem(PLANNED["Session"], "divine", "seeing what comes")
    stop = session.run_to(1)
    with pytest.raises(errors.NotSupported, match="planned"):
        session.divine  # noqa: B018
    for owner in (server, session, stop):
        with pytest.raises(AttributeError):
            owner.nonsense  # noqa: B018
