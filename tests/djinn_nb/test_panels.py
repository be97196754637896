"""Panels: what they show of a snapshot, and that a click does what its Python does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell

import djinn_nb as djinn
from djinn_nb import errors
from djinn_nb.panels import PANELS, base, branches, breakpoints, memory, sessions
from djinn_nb.panels.base import Panel, Panels
from djinn_nb.panels.edit import EditPanel
from djinn_nb.panels.edit_model import EditModel, selection
from djinn_nb.workbench import Workbench, workbench
from kernel_server.protocol.snapshot import Busy, NodeBrief, Notice, ProgressBrief, Snapshot
from tests.djinn_nb.conftest import PROMPT

Make = Callable[[type[Panel]], Any]


@pytest.fixture
def bench(make_shell: Callable[[], InteractiveShell], server: djinn.Server) -> Workbench:
    made = workbench(make_shell())
    made.current.bind("server", server)
    return made


@pytest.fixture
def make(bench: Workbench) -> Make:
    """A panel with its body, up to date."""

    def made(kind: type[Panel]) -> Panel:
        panel = kind(bench)
        assert panel.body is not None
        _until(lambda: bench.snapshot().connection == "ready")
        return panel

    return made


def _until(holds: Callable[[], bool], timeout_s: float = 200.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def _stop_at(bench: Workbench, location: object, **wishes: Any) -> djinn.Session:
    session = bench.current.server.launch(PROMPT, **{"max_new_tokens": 4, **wishes})
    bench.current.bind("session", session)
    bench.current.bind("stop", session.run_to(location))
    _until(lambda: bench.snapshot().session is not None)
    return session


def test_from_a_prompt_to_an_edited_continuation_by_clicks_alone(bench, make) -> None:
    points = make(breakpoints.BreakpointsPanel)
    panel, edit = make(sessions.SessionsPanel), make(EditPanel)
    points._where.value = "2"
    points._add.click()
    _until(lambda: "layers.2.output" in points._list.value)
    assert "runs that follow" in points._list.value and bench.snapshot().pending
    panel._prompt.value, panel._tokens.value = PROMPT, 3
    panel._launch.click()
    _until(lambda: "stopped at layers.2.output" in panel._list.value)
    plain = bench.current.session.fork()
    _until(lambda: "probability of the next token" in edit._preview.value)
    edit._strength.value = 0.25
    edit._apply.click()
    _until(lambda: "scale 0.25" in edit._list.value and not edit._undo.disabled)
    assert bench.snapshot().edits
    points._which.value = points._which.options[1][1]
    points._remove.click()
    _until(lambda: not bench.snapshot().breakpoints)
    panel._buttons["continue"].click()
    _until(lambda: "finished" in panel._list.value and bench.snapshot().busy is None)

    by_hand = plain.stop
    by_hand.edit(scale=0.25, tokens=-1)
    plain.breakpoints[0].remove()
    plain.continue_()
    np.testing.assert_array_equal(plain.logits, bench.current.session.logits)
    code = [action.code for action in bench.snapshot().actions]
    assert "stop.edit(scale=0.25, tokens=-1)" in code and "stop = session.continue_()" in code
    assert bench.snapshot().notice is None


def test_a_preview_follows_the_slider_and_the_newest_wish_wins(bench, make) -> None:
    session, edit = _stop_at(bench, 2), make(EditPanel)
    before = session.refresh()
    for strength in np.linspace(0, 3.9, 40):
        edit._strength.value = float(strength)
    expected = bench.current.stop.preview(scale=edit.model().strength, tokens=-1)
    wanted = f"KL {expected.kl:.3f} nats"

    _until(lambda: wanted in edit._preview.value and not edit._updating.value)
    after = session.refresh()
    assert (after.edits, after.stop_number) == (before.edits, before.stop_number)
    assert not [a for a in bench.snapshot().actions if "preview" in a.label]


def test_a_stop_that_is_shown_before_it_is_bound_is_previewed_all_the_same(bench, make) -> None:
    session, edit = bench.current.server.launch(PROMPT, max_new_tokens=4), make(EditPanel)
    bench.current.bind("session", session)
    found = session.run_to(2)
    _until(lambda: bench.snapshot().session is not None and "at <b>" in edit._place.value)
    time.sleep(0.2)
    assert edit._preview.value == ""
    bench.current.bind("stop", found)

    _until(lambda: "probability of the next token" in edit._preview.value)


def test_a_bad_target_is_refused_in_place_and_changes_nothing(bench, make) -> None:
    session, edit = _stop_at(bench, 2), make(EditPanel)
    edit._tokens.value = "[1, "
    edit._tokens.value = "99"
    _until(lambda: "⚠ error" in edit._refused.value)
    assert "99" in edit._refused.value
    edit._apply.click()
    _until(lambda: [a.outcome for a in bench.snapshot().actions[-1:]] == ["failed"])
    assert bench.snapshot().notice is not None
    assert not session.edits

    edit._tokens.value = "-1"
    _until(lambda: edit._refused.value == "" and "KL" in edit._preview.value)


def test_at_the_logits_a_token_can_be_forced(bench, make) -> None:
    session, edit = _stop_at(bench, "logits"), make(EditPanel)
    _until(lambda: "force" in edit._kind.options)
    edit._kind.value, edit._text.value = "force", '" Mary"'
    assert edit._strength.layout.display == "none" and edit._text.layout.display is None
    edit._apply.click()
    _until(lambda: bool(bench.snapshot().edits))
    session.run_to(1)

    assert session.text.endswith(" Mary")


def test_a_named_vector_is_added(bench, make) -> None:
    vectors = bench.current.server.vectors
    vectors.from_array("up", np.ones(32), location=2, replace=True)
    try:
        _stop_at(bench, 2)
        edit = make(EditPanel)
        edit._kind.value = "add a vector"
        _until(lambda: ("up", "up") in edit._vector.options)
        edit._vector.value, edit._strength.value = "up", 2.0
        edit._apply.click()
        _until(lambda: bool(bench.snapshot().edits))
        assert bench.snapshot().actions[-1].code == "stop.edit(vector='up', alpha=2.0, tokens=-1)"
    finally:
        del vectors["up"]


def test_branches_go_back_by_a_click(bench, make) -> None:
    session = _stop_at(bench, 1)
    bench.current.bind("stop", session.run_to(3))
    panel = make(branches.BranchesPanel)
    _until(lambda: any("layers.3.output" in text for text, _ in panel._nodes.options))
    [number] = [n for text, n in panel._nodes.options if "layers.1.output" in text]
    panel._nodes.value = number
    panel._go.click()
    _until(lambda: bench.current.stop.location == "layers.1.output")

    _until(lambda: bench.snapshot().session.layer == 1)


def test_terminating_and_removing_all_ask_first(bench, make) -> None:
    session = _stop_at(bench, 1)
    session.break_at(4)
    panel, points = make(sessions.SessionsPanel), make(breakpoints.BreakpointsPanel)
    _until(lambda: bool(bench.snapshot().breakpoints))
    panel._terminate.click()  # disabled: a click in the browser does not come here
    assert panel._terminate.disabled and points._clear.disabled

    points._sure.value = True
    _until(lambda: not points._clear.disabled)
    points._clear.click()
    _until(lambda: not bench.snapshot().breakpoints)
    assert points._sure.value is False


def test_the_memory_panel_shows_bytes_with_units_by_tier(bench, make) -> None:
    _stop_at(bench, 1)
    panel = make(memory.MemoryPanel)
    _until(lambda: bench.snapshot().memory is not None)
    shown = panel.html(bench.snapshot())

    assert "device (cpu): KV" in shown and "MiB" in shown and "weights" in shown
    assert "<b>disk: " in shown and "journal" in shown and "no such tier" not in shown
    assert "role='img'" in shown and "%)" in shown  # every colour has its kind, size and share
    assert "no pages have moved" in shown


@pytest.mark.parametrize("name", PANELS)
def test_every_panel_has_a_static_form_and_says_what_to_do_when_there_is_nothing(
    name: str, make_shell: Callable[[], InteractiveShell]
) -> None:
    shell = make_shell()
    bench = workbench(shell)
    panel = shell.magics_manager.registry["DjinnMagics"].djinn_panel(name)
    bundle = panel._repr_mimebundle_()

    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "not connected to a server" in bundle["text/plain"]
    assert "%djinn_connect" in bundle["text/html"] and "aria-label" in bundle["text/html"]
    panel.close()
    assert bench.snapshot().connection == "none"


def test_all_panels_come_in_one_layout(bench) -> None:
    made = bench.current.djinn_panel("")

    assert isinstance(made, Panels)
    assert [one.name for one in made.panels] == list(PANELS)
    assert json.dumps(list(made.body.titles))
    assert made._repr_mimebundle_()["text/html"].count("role='region'") == len(PANELS)
    made.close()


def test_an_unknown_panel_is_refused_by_name(bench) -> None:
    with pytest.raises(errors.BadArgument, match=r"'sesions'.*known: sessions"):
        bench.current.djinn_panel("sesions")


@pytest.mark.parametrize(
    ("connection", "said"),
    [("none", "not connected"), ("connecting", "connecting to a server")],
)
def test_a_state_without_a_session_is_said(connection: Any, said: str) -> None:
    shown = Snapshot(rev=1, kernel="k", connection=connection)

    assert said in base.notice_html(base.state_of(shown))
    assert said in base.one_line(shown)


@pytest.mark.parametrize(
    ("state", "said", "advice"),
    [
        ({"connection": "none"}, "not connected to a server", "Press Connect"),
        (
            {"connection": "connecting", "address": "box:5556"},
            "connecting to box:5556", "Nothing to do",
        ),
        (
            {"connection": "loading", "progress": ProgressBrief(text="weights", done=0.4)},
            "loading the model: weights 40%", "goes on as soon as",
        ),
        (
            {
                "connection": "ready",
                "busy": Busy(text="s1 runs", since_s=0.0, can_pause=True, in_cell=True),
            },
            "what is clicked here waits", "Pause in the sidebar; or interrupt the kernel",
        ),
    ],
)  # fmt: skip
def test_a_state_says_what_to_do(state: dict[str, Any], said: str, advice: str) -> None:
    shown = base.state_of(Snapshot(rev=1, kernel="k", **state))

    assert said in shown.text
    assert advice in shown.advice


def test_texts_of_users_cannot_become_markup() -> None:
    notice = Notice(level="error", code="x", text="<script>", advice="<b>")

    assert "<script>" not in base.notice_html(notice) and "&lt;script&gt;" in base.notice_html(
        notice
    )
    assert "<i>" not in base.table(("a",), [("<i>",)], "", "")


def test_a_tree_is_set_in_where_it_branches() -> None:
    def node(number: int, parent: int | None, current: bool = False) -> NodeBrief:
        return NodeBrief(
            number=number, parent=parent, location="layers.1.output", forward=0, reason="step",
            status="stopped", current=current, kept=True, num_tokens=3, num_edits=number % 3,
        )  # fmt: skip

    tree = [node(1, None), node(2, 1), node(3, 2, True), node(4, 2), node(5, 4), node(9, 77)]
    lines = branches.lines_of(tree)

    assert [number for number, _ in lines] == [1, 2, 3, 4, 5, 9]
    drawn = [text.partition("layers")[0].split(f"\N{NO-BREAK SPACE}{number}")[0]
             for number, text in lines]  # fmt: skip
    assert drawn == ["●", "●", "├─▶", "└─●", "\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}●", "●"]
    assert [text for _, text in lines if "▶" in text] == [lines[2][1]]
    assert len(branches.lines_of([node(i, i - 1 or None) for i in range(1, 5000)])) == 4999


@pytest.mark.parametrize(
    ("text", "expected"),
    [("-1", -1), ("3:7", slice(3, 7)), ("::2", slice(None, None, 2)), ("[0, 2]", [0, 2]),
     ("prompt", "prompt"), (" Mary", " Mary"), ('" Mary"', " Mary")],
)  # fmt: skip
def test_selections_are_read_as_people_write_them(text: str, expected: object) -> None:
    assert selection(text, "tokens", words=("prompt", "generated", "all")) == expected


@pytest.mark.parametrize(
    "model",
    [EditModel(kind="add a vector"), EditModel(kind="force"), EditModel(heads="two")],
)
def test_a_wish_that_lacks_something_says_what(model: EditModel) -> None:
    with pytest.raises(errors.BadArgument):
        model.wishes()
