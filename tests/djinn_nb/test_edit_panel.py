"""The panel of edits: which widgets are shown, what they follow, and what its buttons do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell

import djinn_nb as djinn
from djinn_nb.panels.edit import EditPanel
from djinn_nb.panels.edit_model import KINDS, TOKEN_KINDS
from djinn_nb.workbench import Workbench, workbench
from tests.djinn_nb.conftest import PROMPT

Until = Callable[[Callable[[], bool]], None]


@pytest.fixture
def bench(make_shell: Callable[[], InteractiveShell], server: djinn.Server) -> Workbench:
    made = workbench(make_shell())
    made.current.bind("server", server)
    return made


def _panel(bench: Workbench, location: object, eventually: Until) -> EditPanel:
    """The panel, with a session that stands at a location."""
    session = bench.current.need_server().launch(PROMPT, max_new_tokens=4)
    bench.current.bind("session", session)
    bench.current.bind("stop", session.run_to(location))
    panel = EditPanel(bench)
    assert panel.body is not None
    place = bench.current.need_stop().location
    eventually(lambda: panel._target is not None and panel._target.location == place)
    return panel


def _shown(panel: EditPanel) -> set[str]:
    return {
        field for field, parts in panel._parts.items() if parts[0].layout.display != "none"
    }  # fmt: skip


def test_only_the_fields_that_a_kind_needs_are_shown(bench, eventually):
    panel = _panel(bench, 2, eventually)

    assert set(panel._kind.options) == set(KINDS) - set(TOKEN_KINDS)
    for kind in panel._kind.options:
        panel._kind.value = kind
        assert _shown(panel) == set(KINDS[kind].fields)
        assert (panel._sticky.disabled, panel._heads.disabled) == (
            bool(KINDS[kind].once), "heads" in KINDS[kind].fields
        )  # fmt: skip
    panel._kind.value = "zero"
    assert "no heads: layers.2.output has no heads" in panel._why.value


def test_every_field_is_labelled(bench, eventually):
    panel = _panel(bench, 2, eventually)

    fields = [one for parts in panel._parts.values() for one in parts]
    assert all(one.description for one in (*fields, panel._kind, panel._sticky, panel._which))
    assert panel._sticky.description == "Make sticky" and panel._apply.description == "Apply"


def test_the_chosen_token_and_head_are_followed(bench, eventually):
    panel = _panel(bench, "layers.2.attention.heads", eventually)
    panel._kind.value = "zero"
    panel._words["chosen"].click()
    panel._heads.value = "chosen"
    eventually(lambda: "nothing is chosen" in panel._refused.value and not panel._preview.value)

    bench.select(token=5, head=3)
    eventually(lambda: panel._words["chosen"].description == "chosen (5)")
    eventually(lambda: "8 numbers changed" in panel._preview.value and not panel._refused.value)
    assert panel.model().wishes() == {"zero": True, "tokens": 5, "heads": 3}
    panel._apply.click()
    eventually(lambda: bool(bench.snapshot().edits))

    value = bench.current.need_stop().value.numpy()
    assert not value[5, 3].any() and value[5, :3].all() and value[4, 3].all()


def test_a_strength_that_is_typed_widens_the_slider(bench, eventually):
    panel = _panel(bench, 2, eventually)
    panel._exact.value = 50.0
    assert (panel._strength.max, panel._strength.value, panel.model().strength) == (50, 50, 50)
    panel._exact.value = float("inf")
    assert (panel._strength.max, panel._exact.value) == (50, 50)

    panel._strength.value = 0.5
    assert panel._exact.value == 0.5
    panel._kind.value = "clamp"
    assert (panel._strength.min, panel._strength.max) == (0, 20)
    panel._strength.value = 1.5
    assert panel.model().wishes() == {"clamp": (-1.5, 1.5), "tokens": -1}
    panel._least.value = ""
    assert panel.model().wishes() == {"clamp": (None, 1.5), "tokens": -1}


def test_an_edit_in_force_is_switched_off_on_and_removed(bench, eventually):
    panel = _panel(bench, 2, eventually)
    stop = bench.current.need_stop()
    before = stop.value.numpy()
    panel._kind.value, panel._tokens.value, panel._sticky.value = "zero", "all", True
    panel._apply.click()
    eventually(lambda: "sticky, at this stop" in panel._list.value and panel._which.value == 1)
    eventually(lambda: panel._switch.description == "Disable")

    panel._switch.click()
    eventually(lambda: panel._switch.description == "Enable")
    np.testing.assert_array_equal(stop.value.numpy(), before)
    panel._switch.click()
    eventually(lambda: panel._switch.description == "Disable")
    assert not stop.value.numpy().any()
    panel._remove.click()
    eventually(lambda: "no edit has been made" in panel._list.value)
    np.testing.assert_array_equal(stop.value.numpy(), before)
    code = [action.code for action in bench.snapshot().actions]
    assert code[0] == "stop.edit(zero=True, tokens='all', sticky=True)"


def test_sources_of_a_patch_are_the_other_stops(bench, eventually):
    panel = _panel(bench, 2, eventually)
    other = bench.current.need_session().fork()
    bench.current.bind("stop", bench.current.need_session().next())
    panel._kind.value = "patch"
    eventually(lambda: other.id in [value for _, value in panel._source.options])
    eventually(lambda: any("node" in text for text, _ in panel._source.options))

    panel._source.value = other.id
    panel._tokens.value = "all"
    eventually(lambda: "numbers changed" in panel._preview.value and not panel._refused.value)
    panel._apply.click()
    eventually(lambda: bool(bench.snapshot().edits))
    there = other.stop.value.numpy()
    np.testing.assert_array_equal(bench.current.need_stop().value.numpy(), there)


def test_what_the_server_refuses_is_a_notice_and_changes_nothing(bench, eventually):
    panel = _panel(bench, 2, eventually)
    panel._kind.value = "swap two tokens"
    eventually(lambda: "first: write" in panel._refused.value)
    assert "⚠" not in panel._refused.value  # it is not written to its end
    panel._first.value, panel._second.value = "1", "77"
    eventually(lambda: "⚠ error" in panel._refused.value and "77" in panel._refused.value)

    panel._apply.click()
    eventually(lambda: bench.snapshot().notice is not None)
    assert not bench.current.need_session().refresh().edits


def test_an_answer_about_a_stop_that_has_gone_is_not_shown(bench, eventually, monkeypatch):
    panel = _panel(bench, 2, eventually)
    eventually(lambda: bool(panel._preview.value))
    answers = []
    monkeypatch.setattr(bench, "ask", lambda key, run, told: answers.append(told))
    panel._wish()
    late = djinn.errors.StaleStop("late")

    answers[-1](None, late)
    assert "late" in panel._refused.value
    assert isinstance(bench.current.need_session().continue_(), djinn.Finished)
    eventually(
        lambda: (
            panel._at == ()
            and not (panel._refused.value or panel._updating.value or panel._preview.value)
        )
    )
    answers[-1](None, late)
    assert not panel._refused.value


def test_the_static_form_says_what_would_be_changed(bench, eventually):
    panel = _panel(bench, 2, eventually)
    panel._tokens.value = " Mary"
    eventually(lambda: "probability of the next token" in panel._preview.value)
    html = panel._repr_mimebundle_()["text/html"]

    assert "scale: scale=1.0, tokens=&#x27; Mary&#x27;" in html
    assert "layers.2.output" in html and "no edit has been made" in html
