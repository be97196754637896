"""Edits: what is accepted, where they apply, what undoing does, and what waits meanwhile."""

from __future__ import annotations

import numpy as np
import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import (
    BadEdit,
    BadSelector,
    NotStopped,
    QuotaExceeded,
    StaleStop,
    UndoRefused,
    UnknownEdit,
    UnknownLocation,
    UnknownSession,
)
from kernel_server.state.server_state import Limits
from tests.state.world import LOGITS, World, snapshot

HERE = "layers.2.output"
NEXT = {"location": "logits"}


def at(*indices: int) -> m.Selector:
    return m.Selector(kind="indices", indices=indices)


def cut(start: int | None, stop: int | None, step: int | None = None) -> m.Selector:
    return m.Selector(kind="slice", start=start, stop=stop, step=step)


def text(*token_ids: int) -> m.Selector:
    return m.Selector(kind="text", text=" a", token_ids=token_ids)


def vector(*shape: int) -> Array:
    return Array.from_numpy(np.ones(shape, dtype=np.float32))


@pytest.fixture
def stopped(world: World) -> str:
    """A session stopped after layer 2 in the prefill of tokens 3 1 4 1 5 9."""
    sid = world.launch()
    world.break_at(sid, HERE, when="prefill")
    world.run(sid)
    return sid


@pytest.fixture
def decoding(world: World) -> str:
    """A session stopped after layer 2 in forward 2, which feeds token 7."""
    sid = world.launch(max_new_tokens=6)
    world.break_at(sid, HERE, ignore=2)
    world.run(sid)
    return sid


# --- at the stop ------------------------------------------------------------------------------


def test_an_edit_at_the_stop_is_applied_and_says_what_it_did(world: World, stopped: str):
    reply = world.edit(stopped, kind="scale", factor=0.5, location=HERE, tokens=at(-1))

    assert reply.edit is not None and reply.edits == (reply.edit,)
    assert (reply.edit.elements_changed, reply.edit.norm_before) == (8, 1.0)
    assert (reply.edit.tokens_matched, reply.edit.forwards_matched) == ((5,), 1)
    assert reply.edit.at_this_stop
    assert reply.edit.description == "scale 0.5 at layers.2.output, tokens -1"
    assert world.kinds()[-1] == "changed"


def test_rows_and_channels_are_resolved_for_the_engine(world: World, stopped: str):
    world.prompt_edits = False
    seen = world.session(stopped).stop_number
    spec = m.EditSpec(kind="zero", location=HERE, tokens=at(4, -6), channels=cut(None, 3))
    world.send(m.AddEdit(session_id=stopped, seen=seen, edit=spec))
    (plan,) = world.errands[0].edits

    assert (plan.rows, plan.channels, plan.point) == ((4, 0), (0, 1, 2), 3)
    world.apply_edits()


def test_selecting_all_leaves_rows_and_channels_open(world: World, stopped: str):
    world.prompt_edits = False
    seen = world.session(stopped).stop_number
    for tokens in (m.ALL, m.Selector(kind="prompt"), cut(None, None)):
        spec = m.EditSpec(kind="zero", location=HERE, tokens=tokens)
        world.send(m.AddEdit(session_id=stopped, seen=seen, edit=spec))
        assert (world.errands[0].edits[-1].rows, world.errands[0].edits[-1].channels) == (
            None,
            None,
        )
        world.apply_edits()


def test_every_edit_of_the_stop_is_computed_anew_in_the_order_made(world: World, stopped: str):
    world.edit(stopped, location=HERE, tokens=at(1))
    world.prompt_edits = False
    seen = world.session(stopped).stop_number
    spec = m.EditSpec(kind="zero", location=HERE, tokens=at(2))
    world.send(m.AddEdit(session_id=stopped, seen=seen, edit=spec))

    assert [plan.edit_id for plan in world.errands[0].edits] == [1, 2]
    world.apply_edits()


def test_an_edit_the_engine_refuses_is_not_kept(world: World, stopped: str):
    before = snapshot(world.state)
    world.prompt_edits = False
    seen = world.session(stopped).stop_number
    asked = world.send(
        m.AddEdit(session_id=stopped, seen=seen, edit=m.EditSpec(kind="zero", location=HERE))
    )
    world.apply_edits(fail=True)

    with pytest.raises(BadEdit, match="too large"):
        world.answer_to(asked)
    assert snapshot(world.state) == before


def test_requests_about_the_session_wait_while_edits_are_applied(world: World, stopped: str):
    world.prompt_edits = False
    seen = world.session(stopped).stop_number
    world.send(
        m.AddEdit(session_id=stopped, seen=seen, edit=m.EditSpec(kind="zero", location=HERE))
    )
    undone = world.send(m.UndoEdit(session_id=stopped, seen=seen))
    continued = world.send(m.Continue(session_id=stopped, seen=seen))
    ended = world.send(m.Terminate(session_id=stopped))
    late = world.send(m.Describe(session_id=stopped))

    assert world.engine.stretch is None
    assert {undone, continued, ended} - set(world.replies) == {undone, continued, ended}
    assert world.answer_to(late).session.status == "stopped"
    world.apply_edits()
    assert undone not in world.replies  # the undo has to be computed as well
    world.apply_edits()
    assert world.answer_to(undone).edits == ()
    assert world.answer_to(continued).session.status == "running"
    world.answer_to(ended)
    world.work()


def test_requests_that_waited_for_a_session_now_gone_are_refused(world: World, stopped: str):
    world.prompt_edits = False
    seen = world.session(stopped).stop_number
    world.send(
        m.AddEdit(session_id=stopped, seen=seen, edit=m.EditSpec(kind="zero", location=HERE))
    )
    world.send(m.Terminate(session_id=stopped))
    late = world.send(m.Continue(session_id=stopped, seen=seen))
    world.apply_edits()

    with pytest.raises(UnknownSession):
        world.answer_to(late)


def test_only_so_many_requests_wait():
    world = World(limits=Limits(deferred_per_session=1))
    sid = world.launch(stop_on_entry=True)
    world.work()
    world.prompt_edits = False
    world.send(
        m.AddEdit(session_id=sid, seen=1, edit=m.EditSpec(kind="zero", location="embedding"))
    )
    world.send(m.ReadLogits(session_id=sid))

    with pytest.raises(QuotaExceeded, match="1 requests wait"):
        world.ask(m.ReadLogits(session_id=sid))
    world.finish_checks()


# --- switching, removing, undoing ---------------------------------------------------------------


def test_undoing_at_the_stop_computes_the_value_without_the_edit(world: World, stopped: str):
    world.edit(stopped, location=HERE, tokens=at(1))
    world.edit(stopped, location=HERE, tokens=at(2))
    world.prompt_edits = False
    seen = world.session(stopped).stop_number
    asked = world.send(m.UndoEdit(session_id=stopped, seen=seen))

    assert [plan.edit_id for plan in world.errands[0].edits] == [1]
    world.apply_edits()
    reply = world.answer_to(asked)
    assert (reply.edit, [e.id for e in reply.edits]) == (None, [1])


def test_undoing_the_only_edit_restores_the_value(world: World, stopped: str):
    world.edit(stopped, location=HERE)
    world.prompt_edits = False
    world.send(m.UndoEdit(session_id=stopped, seen=world.session(stopped).stop_number))

    assert world.errands[0].edits == ()
    world.apply_edits()


def test_switching_an_edit_off_and_on_at_its_stop_takes_it_back_and_redoes_it(
    world: World, stopped: str
):
    world.edit(stopped, location=HERE)
    off = world.ask(m.EnableEdit(session_id=stopped, edit_id=1, enabled=False)).edit
    on = world.ask(m.EnableEdit(session_id=stopped, edit_id=1, enabled=True)).edit

    assert (off.enabled, off.elements_changed, off.forwards_matched) == (False, None, 0)
    assert (on.enabled, on.elements_changed, on.forwards_matched) == (True, 8, 1)


def test_an_edit_cannot_be_taken_back_once_the_session_has_moved_on(world: World, stopped: str):
    world.edit(stopped, location=HERE)
    world.run(stopped, m.Next)
    seen = world.session(stopped).stop_number
    before = snapshot(world.state)

    with pytest.raises(UndoRefused, match=r"belongs to layers.2.output of forward 0, and session"):
        world.ask(m.RemoveEdit(session_id=stopped, edit_id=1))
    with pytest.raises(UndoRefused, match=r"session.rewind\(0, 'layers.2.output'\)"):
        world.ask(m.EnableEdit(session_id=stopped, edit_id=1, enabled=False))
    with pytest.raises(UndoRefused, match="no edit was made at stop"):
        world.ask(m.UndoEdit(session_id=stopped, seen=seen))
    assert snapshot(world.state) == before


def test_an_edit_switched_off_in_time_may_be_removed_later(world: World, stopped: str):
    world.edit(stopped, location=HERE)
    world.ask(m.EnableEdit(session_id=stopped, edit_id=1, enabled=False))
    world.run(stopped, m.Next)

    with pytest.raises(UndoRefused, match="switched on"):
        world.ask(m.EnableEdit(session_id=stopped, edit_id=1, enabled=True))
    assert world.ask(m.RemoveEdit(session_id=stopped, edit_id=1)).edits == ()


def test_an_unknown_edit_is_named(world: World, stopped: str):
    with pytest.raises(UnknownEdit, match="no edit 4: the session has none"):
        world.ask(m.RemoveEdit(session_id=stopped, edit_id=4))


def test_editing_needs_the_stop_that_was_seen(world: World, stopped: str):
    spec = m.EditSpec(kind="zero", location=HERE)

    with pytest.raises(StaleStop):
        world.ask(m.AddEdit(session_id=stopped, seen=0, edit=spec))
    world.go(stopped)
    with pytest.raises(NotStopped):
        world.ask(m.AddEdit(session_id=stopped, seen=1, edit=spec))
    world.work()


def test_a_session_may_have_so_many_edits():
    world = World(limits=Limits(edits_per_session=1))
    sid = world.launch()
    world.edit(sid, location=HERE)

    with pytest.raises(QuotaExceeded, match="has 1 edits, the limit"):
        world.edit(sid, location=HERE)


# --- ahead ------------------------------------------------------------------------------------


def test_an_edit_ahead_is_recorded_and_applied_on_the_way(world: World, stopped: str):
    reply = world.edit(stopped, location="layers.4.output", tokens=at(0))
    assert reply.edit is not None and reply.edit.elements_changed is None
    world.go(stopped)
    (plan,) = world.stretch.edits

    assert (plan.point, plan.rows) == (5, (0,))
    world.done()
    assert world.stretch.edits == ()  # it belonged to that forward
    info = world.edit_info(stopped)
    assert (info.elements_changed, info.forwards_matched, info.at_this_stop) == (8, 1, False)
    world.work()


def test_an_edit_ahead_becomes_part_of_the_stop_it_stands_at(world: World, stopped: str):
    world.edit(stopped, location="layers.3.output")
    world.run(stopped, m.Next)

    assert world.edit_info(stopped).at_this_stop
    reply = world.ask(m.EnableEdit(session_id=stopped, edit_id=1, enabled=False))
    assert reply.edit.elements_changed is None


def test_an_edit_ahead_can_be_removed_without_computing(world: World, stopped: str):
    world.edit(stopped, location="layers.4.output")
    world.prompt_edits = False
    world.ask(m.RemoveEdit(session_id=stopped, edit_id=1))

    assert not world.errands


def test_a_waiting_session_takes_edits_for_its_first_forward(world: World):
    sid = world.launch()
    world.edit(sid, location=HERE, tokens=m.Selector(kind="prompt"))
    world.go(sid)

    assert [plan.point for plan in world.stretch.edits] == [3]
    world.work()


def test_an_edit_behind_is_refused_with_the_way_to_do_it(world: World, stopped: str):
    before = snapshot(world.state)

    with pytest.raises(
        BadEdit,
        match=r"has passed in forward 0.*session.rewind\(0, 'layers.1.output'\).*make the edit st",
    ):
        world.edit(stopped, location="layers.1.output")
    assert snapshot(world.state) == before


# --- sticky -----------------------------------------------------------------------------------


def test_a_sticky_edit_applies_in_every_later_forward_and_counts(world: World, stopped: str):
    world.edit(stopped, location=HERE, sticky=True)
    world.run(stopped)
    info = world.edit_info(stopped)

    assert (info.forwards_matched, info.forwards_unmatched) == (4, 0)
    assert info.tokens_matched == (8,)


def test_a_sticky_edit_counts_the_forwards_in_which_nothing_matched(world: World, stopped: str):
    world.edit(stopped, location=HERE, tokens=text(5, 7), sticky=True)
    world.draw = lambda position: 7 if position == 7 else 8
    world.run(stopped)
    info = world.edit_info(stopped)

    # token 4 of the prompt and token 7 match; tokens 6 and 8 do not
    assert (info.forwards_matched, info.forwards_unmatched) == (2, 2)
    assert info.tokens_matched == (7,)


def test_a_sticky_edit_whose_place_has_passed_starts_at_the_next_forward(
    world: World, stopped: str
):
    reply = world.edit(stopped, location="layers.0.output", sticky=True)
    assert reply.edit is not None and reply.edit.forward == 1
    world.go(stopped)

    assert world.stretch.edits == ()
    world.done()
    assert [plan.point for plan in world.stretch.edits] == [1]
    world.work()
    assert world.edit_info(stopped).forwards_matched == 3


def test_a_sticky_edit_can_be_switched_off_while_the_session_runs(world: World, stopped: str):
    world.edit(stopped, location=HERE, sticky=True)
    world.go(stopped)
    world.done()
    assert len(world.stretch.edits) == 1
    world.ask(m.EnableEdit(session_id=stopped, edit_id=1, enabled=False))
    world.done()

    assert world.stretch.edits == ()
    world.work()
    assert world.edit_info(stopped).forwards_matched == 2


def test_a_sticky_edit_that_does_not_match_here_is_no_part_of_the_stop(world: World, stopped: str):
    world.edit(stopped, location="layers.4.output", tokens=text(9), sticky=True)
    world.run(stopped, m.RunTo, location="layers.4.output")
    assert world.edit_info(stopped).at_this_stop  # token 5 of the prompt
    world.run(stopped, m.RunTo, location="layers.4.output")

    assert not world.edit_info(stopped).at_this_stop
    world.prompt_edits = False
    world.ask(m.EnableEdit(session_id=stopped, edit_id=1, enabled=False))
    assert not world.errands


def test_a_sticky_edit_switched_off_in_a_long_prefill_reaches_the_engine_soon(world: World):
    sid = world.launch()
    world.edit(sid, location="layers.4.output", sticky=True)
    world.go(sid)
    world.ask(m.EnableEdit(session_id=sid, edit_id=1, enabled=False))

    assert world.engine.interrupted
    world.done(2)
    assert world.stretch.edits == ()
    world.work()


def test_an_edit_that_failed_on_the_way_is_not_counted(world: World, stopped: str):
    world.edit(stopped, location="layers.3.output", sticky=True)
    world.go(stopped)
    world.fail(4, code="BadEdit")
    session = world.session(stopped)

    assert session.stop is not None and session.stop.reason == "exception"
    assert session.edits[0].forwards_matched == 0


def test_a_sticky_edit_removed_at_a_stop_where_it_applied_is_taken_back(world: World, stopped: str):
    world.edit(stopped, location=HERE, sticky=True)
    world.run(stopped, m.StepOut)
    world.run(stopped, m.RunTo, location=HERE)
    world.prompt_edits = False
    world.send(m.RemoveEdit(session_id=stopped, edit_id=1))

    assert world.errands[0].edits == ()
    world.apply_edits()


@pytest.mark.parametrize(
    "tokens", [m.Selector(kind="prompt"), at(2), at(-2), cut(0, 5), cut(-5, -1)]
)
def test_a_sticky_edit_that_can_never_match_is_refused(world: World, decoding: str, tokens):
    before = snapshot(world.state)

    with pytest.raises(BadEdit, match=r"selects no token of forward \d or later"):
        world.edit(decoding, location=HERE, tokens=tokens, sticky=True)
    assert snapshot(world.state) == before


@pytest.mark.parametrize(
    "tokens", [m.ALL, m.Selector(kind="generated"), at(-1), at(9), cut(-1, None), text(40)]
)
def test_a_sticky_edit_that_may_match_later_is_accepted(world: World, decoding: str, tokens):
    assert world.edit(decoding, location="layers.4.output", tokens=tokens, sticky=True).edit


def test_a_sticky_edit_that_matches_nothing_here_starts_at_the_next_forward(
    world: World, stopped: str
):
    reply = world.edit(stopped, location=HERE, tokens=m.Selector(kind="generated"), sticky=True)
    assert reply.edit is not None
    assert (reply.edit.forward, reply.edit.at_this_stop) == (1, False)
    world.run(stopped)

    assert world.edit_info(stopped).forwards_matched == 3


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ({"kind": "scale"}, BadEdit, "scale needs a factor"),
        ({"kind": "zero", "factor": 2.0}, BadEdit, "zero takes no factor"),
        ({"kind": "scale", "factor": float("nan")}, BadEdit, "factor is nan"),
        ({"kind": "add"}, BadEdit, "add needs a value"),
        ({"kind": "add", "value": vector(8), "alpha": float("inf")}, BadEdit, "alpha is inf"),
        ({"kind": "set", "value": vector(8), "alpha": 2.0}, BadEdit, "set takes no alpha"),
        ({"kind": "zero", "value": vector(8)}, BadEdit, "zero takes no value"),
        ({"kind": "double"}, BadEdit, "'double' is not one of"),
        ({"kind": "set", "value": vector(7)}, BadEdit, r"\[7\], and 8 channels"),
        ({"kind": "set", "value": vector(5, 8)}, BadEdit, r"\[5, 8\], and 6 tokens"),
        ({"kind": "set", "value": vector(1, 6, 8)}, BadEdit, r"shape \[1, 6, 8\]"),
        ({"kind": "set", "value": vector(0)}, BadEdit, r"shape \[0\]"),
        ({"kind": "set", "value": vector(6, 8), "sticky": True}, BadEdit, "sticky edit takes"),
        ({"kind": "set", "value": Array("bool", (2,), b"\x01\x00")}, BadEdit, "8 channels"),
        (
            {"kind": "add", "value": Array.from_numpy(np.array([1.0, np.nan, np.inf]))},
            BadEdit,
            "2 of 3 elements",
        ),
        ({"kind": "zero", "upload_id": "u1"}, BadEdit, "has not arrived"),
        ({"kind": "set", "vector": "joy"}, BadEdit, "vector 'joy' has not been looked up"),
        ({"kind": "force", "token_texts": (" a",)}, BadEdit, "' a' has not been looked up"),
        ({"kind": "clamp"}, BadEdit, "clamp needs a minimum or a maximum"),
        ({"kind": "clamp", "minimum": 2.0, "maximum": 1.0}, BadEdit, "between 2 and 1 leaves no"),
        ({"kind": "clamp", "maximum": float("nan")}, BadEdit, "maximum is nan"),
        ({"kind": "scale", "factor": 2.0, "minimum": 1.0}, BadEdit, "takes no minimum, clamp does"),
        ({"kind": "project_out"}, BadEdit, "project_out needs a value"),
        ({"kind": "project_out", "value": vector()}, BadEdit, "not one number"),
        ({"kind": "project_out", "value": vector(7)}, BadEdit, r"\[7\], and 8 channels"),
        (
            {"kind": "project_out", "value": Array.from_numpy(np.eye(8, dtype=np.float32)[:2] * 0)},
            BadEdit,
            "direction 0 of 2 is zero",
        ),
        ({"kind": "mean", "value": vector(8)}, BadEdit, "add, set and project_out do"),
        ({"kind": "mean", "sticky": True}, BadEdit, "a decode feeds one token"),
        ({"kind": "swap", "tokens": at(1, 2), "sticky": True}, BadEdit, "a decode feeds one token"),
        (
            {"kind": "swap", "tokens": at(0, 1, 2)},
            BadEdit,
            "exactly two tokens, and 3 are selected",
        ),
        ({"kind": "swap", "tokens": at(2)}, BadEdit, "exactly two tokens, and 1 are selected"),
        ({"kind": "swap", "location": "logits"}, BadEdit, "exactly two tokens, and 1 are selected"),
        ({"kind": "zero", "token_ids": (1,)}, BadEdit, "force, ban and replace do"),
        ({"kind": "force"}, BadEdit, "force needs tokens"),
        ({"kind": "force", "token_ids": (3,)}, BadEdit, "its place is the logits, not layers.2"),
        ({**NEXT, "kind": "force", "token_ids": (3, 4)}, BadEdit, "one token, 2 are named"),
        ({**NEXT, "kind": "force", "token_ids": (50,)}, BadEdit, "outside the vocabulary .0 to 49"),
        ({**NEXT, "kind": "ban", "token_ids": ()}, BadEdit, "ban needs tokens"),
        ({**NEXT, "kind": "ban", "token_ids": (-1,)}, BadEdit, "token id -1 lies outside"),
        ({**NEXT, "kind": "ban", "token_ids": (*range(50), 3)}, BadEdit, "ban of all 50 tokens"),
        ({**NEXT, "kind": "ban", "token_ids": (1,), "channels": at(1)}, BadEdit, "leave heads and"),
        ({**NEXT, "kind": "replace", "token_ids": (1,)}, BadEdit, "two tokens.*1 are named"),
        ({**NEXT, "kind": "replace", "token_ids": (1, 1)}, BadEdit, "both are 1"),
        ({"heads": at(0)}, BadSelector, "no heads"),
        ({"location": "layers.3.attention.heads", "heads": at(2)}, BadSelector, "head 2 lies"),
        (
            {
                "location": "layers.3.attention.heads",
                "kind": "set",
                "value": vector(5),
                "heads": at(1),
            },
            BadEdit,
            r"\[5\], and 4 channels",
        ),
        (
            {
                "location": "layers.3.attention.pattern",
                "kind": "add",
                "value": vector(12),
                "sticky": True,
            },
            BadEdit,
            "every forward has one key more",
        ),
        ({"tokens": at(6)}, BadEdit, r"token 6 is fed in forward 1; forward 0 feeds tokens 0 to 5"),
        ({"tokens": at(9)}, BadSelector, "token 9 lies outside the session: it has 6 tokens"),
        ({"tokens": at(-7)}, BadSelector, "token -7 lies outside"),
        ({"tokens": at(5, -1)}, BadSelector, "token 5 is listed twice"),
        ({"tokens": at()}, BadSelector, "selects nothing"),
        ({"tokens": cut(4, 2)}, BadEdit, "no token of forward 0"),
        ({"tokens": cut(0, 6, 0)}, BadSelector, "step 0"),
        ({"tokens": text(30)}, BadEdit, "no token of forward 0"),
        ({"tokens": text()}, BadSelector, "no token of this model"),
        ({"channels": at(8)}, BadSelector, "channel 8 lies outside the tensor's 8 channels"),
        ({"channels": at(1, 1)}, BadSelector, "channel 1 is listed twice"),
        ({"channels": cut(8, None)}, BadSelector, "none of 8 channels"),
        ({"channels": text(3)}, BadSelector, "by index or slice"),
        ({"location": "layers.99.output"}, UnknownLocation, "numbered 0 to 4"),
        ({"location": "logits", "tokens": at(0)}, BadEdit, "last token only: select token 5"),
        ({"location": "logits", "kind": "set", "value": vector(8)}, BadEdit, "50 channels"),
    ],
)
def test_a_bad_edit_is_refused_with_numbers_and_changes_nothing(
    world: World, stopped: str, spec, error, words
):
    before = snapshot(world.state)

    with pytest.raises(error, match=words):
        world.edit(stopped, **{"location": HERE, **spec})
    assert snapshot(world.state) == before


def test_a_token_of_an_earlier_forward_is_refused_with_the_forward_that_fed_it(
    world: World, decoding: str
):
    with pytest.raises(
        BadEdit, match=r"fed in forward 0; forward 2 feeds token 7: session.rewind\(0, 'layers.2.ou"
    ):
        world.edit(decoding, location=HERE, tokens=at(3))
    with pytest.raises(BadEdit, match="token 6 was fed in forward 1"):
        world.edit(decoding, location=HERE, tokens=at(6, 7))
    with pytest.raises(BadEdit, match="token 2 was fed in forward 0"):
        world.edit(decoding, location=HERE, tokens=text(4))


def test_a_text_that_occurs_several_times_selects_all_and_says_so(world: World, stopped: str):
    edit = world.edit(stopped, location=HERE, tokens=text(1)).edit

    assert edit is not None
    assert edit.tokens_matched == (1, 3)
    assert edit.note == "' a' occurs 2 times: positions 1, 3"


def test_a_slice_that_reaches_back_changes_this_forward_only_and_says_so(
    world: World, decoding: str
):
    edit = world.edit(decoding, location=HERE, tokens=cut(None, None)).edit

    assert edit is not None and edit.tokens_matched == (7,)
    assert edit.note is not None and "7 more tokens selected were fed in earlier" in edit.note


def test_logits_are_edited_for_the_last_token(world: World, stopped: str):
    world.edit(stopped, kind="add", value=vector(50), location="logits")
    world.go(stopped)
    (plan,) = world.stretch.edits

    assert (plan.point, plan.rows) == (LOGITS, None)
    world.work()
    assert world.edit_info(stopped).tokens_matched == (5,)


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (vector(), {}),
        (vector(8), {}),
        (vector(6, 8), {}),
        (vector(2, 8), {"tokens": at(4, 1)}),
        (vector(3), {"channels": cut(0, 3)}),
        (vector(2, 1), {"tokens": at(4, 1), "channels": at(-1)}),
    ],
)
def test_values_of_every_fitting_shape_are_accepted(world: World, stopped: str, value, options):
    assert world.edit(stopped, kind="set", value=value, location=HERE, **options).edit


# --- heads, keys and the next token -------------------------------------------------------------


def test_heads_choose_the_channels_that_are_theirs(world: World, stopped: str):
    world.edit(stopped, location="layers.3.attention.heads", heads=at(1))
    world.edit(stopped, location="layers.3.attention.heads", heads=at(1, 0), channels=cut(0, 2))
    world.go(stopped)

    assert [plan.channels for plan in world.stretch.edits] == [(4, 5, 6, 7), (4, 5, 0, 1)]
    world.work()


def test_the_keys_of_a_pattern_are_counted_anew_in_every_forward(world: World, stopped: str):
    world.edit(
        stopped, location="layers.3.attention.pattern", heads=at(1), channels=at(-1), sticky=True
    )
    world.go(stopped)
    found = []
    while world.engine.stretch is not None:
        found += [plan.channels for plan in world.stretch.edits]
        world.done()

    # head 1, last key: of 6 keys, then of 7, 8 and 9
    assert found == [(11,), (13,), (15,), (17,)]


def test_the_next_token_is_forced_in_every_forward_of_a_sticky_edit(world: World, stopped: str):
    edit = world.edit(stopped, kind="force", token_ids=(7,), sticky=True, **NEXT).edit
    assert edit is not None and edit.description == "force token 7 at logits, tokens all, sticky"
    world.run(stopped)

    assert world.edit_info(stopped).forwards_matched == 4


def test_the_mean_of_one_token_says_that_nothing_changes(world: World, stopped: str):
    edit = world.edit(stopped, kind="mean", location=HERE, tokens=at(-1)).edit

    assert edit is not None and edit.note is not None and "its own mean" in edit.note


SOURCE = m.PatchSource(session_id="s7", seen=3)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"kind": "scale", "factor": 0.9}, "scale 0.9"),
        ({"kind": "add", "value": vector(8), "alpha": 4.0}, "add 4 × value [8]"),
        ({"kind": "add", "value": vector(8), "vector": "joy"}, "add vector 'joy'"),
        ({"kind": "set", "value": vector()}, "set 1"),
        (
            {"kind": "set", "value": vector(6, 8), "source": SOURCE},
            "patch [6, 8] of session s7, stop 3",
        ),
        ({"kind": "clamp", "minimum": -1.0}, "clamp -1…"),
        ({"kind": "clamp", "minimum": -1.0, "maximum": 0.5}, "clamp -1…0.5"),
        ({"kind": "project_out", "value": vector(2, 8)}, "project_out value [2, 8]"),
        ({"kind": "mean"}, "mean"),
        ({**NEXT, "kind": "ban", "token_ids": (3, 4)}, "ban tokens 3, 4"),
        ({**NEXT, "kind": "ban", "token_ids": tuple(range(10))}, "… 2 more"),
        (
            {**NEXT, "kind": "replace", "token_ids": (3, 4), "token_texts": (" a", " b")},
            "replace ' a' by ' b'",
        ),
    ],
)
def test_an_edit_says_what_it_does(world: World, stopped: str, spec, words):
    edit = world.edit(stopped, **{"location": HERE, **spec}).edit

    assert edit is not None and words in edit.description
    assert edit.description.endswith(f"at {edit.location}, tokens all")


# --- forks ------------------------------------------------------------------------------------


def test_a_fork_has_the_same_edits_and_undoes_them_by_itself(world: World, stopped: str):
    world.edit(stopped, location=HERE)
    world.edit(stopped, location="layers.4.output", sticky=True)
    child = world.ask(m.Fork(session_id=stopped)).session

    assert child.edits == world.session(stopped).edits
    world.ask(m.UndoEdit(session_id=child.id, seen=child.stop_number))
    world.ask(m.UndoEdit(session_id=child.id, seen=child.stop_number))
    assert world.session(child.id).edits == ()
    assert [e.id for e in world.session(stopped).edits] == [1, 2]
