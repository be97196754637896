"""Many prompts as one: the same for each, a row for each, and one's error is not the others'."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import djinn_nb as djinn
from djinn_nb import errors
from djinn_nb.metrics import LogitDifference, OnText, Probability
from djinn_nb.prompts import is_list_of_prompts
from tests.djinn_nb.conftest import HIDDEN, PROMPT, Process, make_model

PROMPTS = ["Mary went to the store", "Anna gave a book to Paul", "John gave Mary a drink"]


def _ends(server: djinn.Server, prompts: list[str], tokens: int) -> list[str]:
    """The continuations of the prompts launched one by one."""
    texts = []
    for prompt in prompts:
        session = server.launch(prompt, max_new_tokens=tokens)
        texts.append(session.continue_().generated_text)
        session.terminate()
    return texts


def test_each_prompt_runs_as_it_would_alone_and_is_a_row(server: djinn.Server) -> None:
    expected = _ends(server, PROMPTS, 4)

    sessions = server.launch(PROMPTS, max_new_tokens=4)
    frame = sessions.continue_().frame()

    assert isinstance(sessions, djinn.Sessions)
    assert list(frame.text) == expected
    assert list(frame.prompt) == PROMPTS
    assert set(frame.status) == {"finished"} and set(frame.tokens) == {4}
    assert set(frame.finish_reason) == {"max_new_tokens"} and set(frame.error) == {""}
    assert repr(sessions) == "Sessions of 3 prompts: 3 finished"


def test_lists_of_texts_and_of_token_ids_are_many_prompts_a_flat_list_is_one(
    server: djinn.Server,
) -> None:
    assert not any(is_list_of_prompts(one) for one in ("a", [1, 2], (1,), [], np.arange(3), None))
    assert all(is_list_of_prompts(one) for one in (["a"], [[1], (2, 3)], np.ones((2, 2), int)))
    with pytest.raises(errors.BadArgument, match="mixes them"):
        server.launch(["a", 1], max_new_tokens=1)

    assert isinstance(server.launch([1, 2, 3], max_new_tokens=1), djinn.Session)
    many = server.launch([[1, 2], [3]], max_new_tokens=1)
    assert [list(session.tokens) for session in many] == [[1, 2], [3]]


def test_breakpoints_and_edits_are_the_same_for_each(server: djinn.Server) -> None:
    sessions = server.launch(PROMPTS, max_new_tokens=2)

    points = sessions.break_at("layers.3.output", when="prefill")
    edits = sessions.edit(add=np.ones(HIDDEN), location=1, sticky=True)
    stopped = sessions.continue_().frame()
    alone = server.launch(PROMPTS[1], max_new_tokens=2)
    alone.run_to("layers.1.output").edit(add=np.ones(HIDDEN), sticky=True)
    expected = alone.run_to("layers.3.output").value.numpy()

    assert len(points) == len(edits) == 3
    assert set(stopped.location) == {"layers.3.output"} and set(stopped.status) == {"stopped"}
    np.testing.assert_array_equal(sessions[1].stop.value.numpy(), expected)
    sessions.edit(scale=0.0, tokens=-1)
    assert not sessions[2].stop.value.numpy()[-1].any()
    assert set(sessions.continue_().frame().status) == {"finished"}
    for call in (
        sessions.continue_,
        lambda: sessions.break_at(1),
        lambda: sessions.edit(zero=True),
    ):
        with pytest.raises(errors.NotStopped, match="every session of the list"):
            call()


def test_watches_are_the_same_for_each(server: djinn.Server) -> None:
    sessions = server.launch(PROMPTS, max_new_tokens=2)

    sessions.break_when(norm_above=0.0)

    assert set(sessions.continue_().frame().location) == {"layers.0.output"}


def test_metrics_are_columns_of_logits_or_text(server: djinn.Server) -> None:
    sessions = server.launch(PROMPTS, max_new_tokens=3)
    metrics = [LogitDifference(" Mary", " John"), OnText(len, name="length")]

    at_logits = sessions.run_to("logits").frame(metrics)
    difference = LogitDifference(" Mary", " John").on(server.model)
    by_hand = [difference(session.stop.value) for session in sessions]
    finished = sessions.continue_().frame(metrics)

    name = difference.name
    assert list(at_logits[name]) == by_hand
    assert list(finished.length) == [len(text) for text in finished.text]
    assert list(finished[name]) == [difference(session.logits) for session in sessions]
    assert list(finished.forward) == [2, 2, 2]


def test_a_metric_without_a_value_yet_is_a_mistake_of_all(server: djinn.Server) -> None:
    sessions = server.launch(PROMPTS, max_new_tokens=3)

    with pytest.raises(errors.NotFinished, match="has not come to logits yet"):
        sessions.frame(Probability(3))
    sessions[0].run_to("logits")
    frame = sessions.frame(Probability(3))
    assert frame["probability 3"].notna().tolist() == [True, False, False]
    assert frame.error[1].startswith("NotFinished")


def test_a_prompt_that_is_refused_is_a_row_and_the_others_go_on(server: djinn.Server) -> None:
    sessions = server.launch([PROMPTS[0], "", PROMPTS[1]], max_new_tokens=2)

    frame = sessions.continue_().frame()

    assert list(frame.status) == ["finished", "not launched", "finished"]
    assert frame.error[1].startswith("BadPrompt: the prompt is empty")
    assert "1 with an error" in repr(sessions)
    with pytest.raises(errors.BadPrompt):
        sessions[1]
    with pytest.raises(IndexError):
        sessions[3]
    assert len(sessions) == 3 and len(list(sessions)) == 2


def test_what_every_prompt_refuses_is_raised_and_leaves_no_session(server: djinn.Server) -> None:
    with pytest.raises(errors.BadArgument, match="max_new_tokens"):
        server.launch(PROMPTS, max_new_tokens=0)
    assert len(server.sessions()) == 0
    sessions = server.launch(PROMPTS, max_new_tokens=2)

    with pytest.raises(errors.UnknownLocation):
        sessions.break_at("layers.99.output")
    with pytest.raises(errors.BadEdit, match="say where to edit"):
        sessions.edit(scale=2)
    assert all(not session.breakpoints and not session.edits for session in sessions)


def test_one_that_somebody_else_ended_does_not_stop_the_others(server: djinn.Server) -> None:
    sessions = server.launch(PROMPTS, max_new_tokens=2)
    server.attach(sessions[1].id).terminate()

    frame = sessions.continue_().frame()

    assert [status == "finished" for status in frame.status] == [True, False, True]
    assert frame.error[1].startswith("UnknownSession")


def test_a_list_used_with_with_leaves_no_session_but_its_table(server: djinn.Server) -> None:
    with server.launch(PROMPTS, max_new_tokens=2) as sessions:
        before = sessions.continue_().frame()

    assert len(server.sessions()) == 0
    assert sessions.frame().text.tolist() == before.text.tolist()
    assert "<table" in sessions._repr_html_()


def test_names_are_numbered_and_options_are_of_all(server: djinn.Server) -> None:
    sessions = server.launch(
        PROMPTS, max_new_tokens=2, name="run", seed=5, temperature=0.8, stop_on_entry=True
    )

    assert [session.name for session in sessions] == ["run 0", "run 1", "run 2"]
    assert {session.seed for session in sessions} == {5}
    assert {session.status for session in sessions} == {"stopped"}


# -- more prompts than sessions -----------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Process]:
    """A server on which one owner may have three sessions."""
    folder = tmp_path_factory.mktemp("small") / "run"
    made = Process(
        folder, "--model", str(model_folder), "--sessions-per-owner", "3",
        "--vectors-per-owner", "1",
    )  # fmt: skip
    yield made
    made.end()


def test_a_list_longer_than_an_owner_may_have_runs_in_waves(
    small: Process, server: djinn.Server
) -> None:
    prompts = [f"{prompt} {number}" for number in range(4) for prompt in PROMPTS]
    expected = _ends(server, prompts, 3)

    with small.connect() as few:
        with few.launch(prompts, max_new_tokens=3) as sessions:
            sessions.edit(scale=1.0, location=2)
            assert len(few.sessions()) == 3
            frame = sessions.continue_().frame(Probability(7))
            assert len(few.sessions()) == 3
        assert len(few.sessions()) == 0

    assert list(frame.text) == expected
    assert set(frame.status) == {"finished"} and set(frame.error) == {""}
    assert frame["probability 7"].between(0, 1).all()


def test_stopped_sessions_keep_their_places_and_the_rest_says_so(small: Process) -> None:
    with small.connect() as few, few.launch(PROMPTS * 2, max_new_tokens=2) as sessions:
        sessions.break_at("layers.2.output", when="prefill")

        first = sessions.continue_().frame()
        done = sessions.continue_().frame()
        last = sessions.continue_().frame()

    assert list(first.status) == ["stopped"] * 3 + ["not launched"] * 3
    assert first.error[3].startswith("QuotaExceeded: you have 3 sessions")
    # each that is launched in a later wave has the breakpoint too
    assert list(done.status) == ["finished"] * 3 + ["stopped"] * 3
    assert list(last.status) == ["finished"] * 6


def test_an_owner_at_the_limit_of_vectors_is_refused_and_keeps_those_there_are(
    small: Process,
) -> None:
    with small.connect() as few:
        few.vectors.from_array("one", np.ones(HIDDEN), location=2)
        with pytest.raises(errors.QuotaExceeded, match="you have 1 vectors, the limit is 1"):
            few.vectors.from_array("two", np.ones(HIDDEN), location=2)
        assert list(few.vectors) == ["one"]
        del few.vectors["one"]


# -- conversations ------------------------------------------------------------------------------


TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server whose tokenizer has a chat template."""
    folder = make_model(tmp_path_factory.mktemp("chat") / "tiny-chat")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    made = Process(tmp_path_factory.mktemp("chat-server") / "run", "--model", str(folder))
    yield made
    made.end()


def test_a_conversation_is_launched_in_the_models_own_template(chatting: Process) -> None:
    turns = [{"role": "user", "content": "Mary went"}]
    with chatting.connect() as server:
        session = server.launch(messages=turns, max_new_tokens=2)
        assert session.text == "<user>Mary went<assistant>"
        unfinished = [*turns, {"role": "assistant", "content": "to the"}]
        gone_on = server.launch(messages=unfinished, max_new_tokens=2)
        assert gone_on.text == "<user>Mary went<assistant>to the"
        assert len(session.continue_().generated_tokens) == 2


def test_a_model_without_a_template_says_what_to_do(server: djinn.Server) -> None:
    with pytest.raises(errors.NotSupported, match=r"no chat template.*write it as one text"):
        server.launch(messages=[{"role": "user", "content": "a"}], max_new_tokens=1)


@pytest.mark.parametrize(
    "messages",
    [
        "a",
        {"role": "user", "content": "a"},
        [],
        ["a"],
        [{"role": "user"}],
        [{"role": 1, "content": "a"}],
    ],
)
def test_what_is_no_conversation_is_refused(server: djinn.Server, messages: object) -> None:
    with pytest.raises(errors.BadPrompt, match="messages are a list of"):
        server.launch(messages=messages, max_new_tokens=1)
    with pytest.raises(errors.BadPrompt, match="not both"):
        server.launch(PROMPT, messages=messages, max_new_tokens=1)
