"""Edits by hand: the fields of a kind, the Python they make, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell

import djinn_nb as djinn
from djinn_nb import edit_verbs, errors, verbs
from djinn_nb.panels.edit_model import (
    ABLATIONS,
    KINDS,
    OF_VECTORS,
    TOKEN_KINDS,
    EditModel,
    Target,
    bound,
    next_tokens,
    selection,
)
from djinn_nb.workbench import Workbench, workbench
from tests.djinn_nb.conftest import HIDDEN, NUM_LAYERS, PROMPT, VOCABULARY

PATTERN = "layers.2.attention.pattern"
MakeBench = Callable[[], tuple[Workbench, InteractiveShell]]


@pytest.fixture
def make_bench(make_shell: Callable[[], InteractiveShell], server: djinn.Server) -> MakeBench:
    def make() -> tuple[Workbench, InteractiveShell]:
        shell = make_shell()
        bench = workbench(shell)
        bench.current.bind("server", server)
        return bench, shell

    return make


@pytest.fixture
def up(server: djinn.Server) -> Any:
    """A named vector."""
    yield server.vectors.from_array("up", np.ones(HIDDEN), location=2, replace=True)
    del server.vectors["up"]


def _stand(bench: Workbench, location: object) -> djinn.Stopped:
    """A session of this notebook, stopped there; node 1 is a stop before."""
    session = bench.current.need_server().launch(PROMPT, max_new_tokens=3)
    bench.current.bind("session", session)
    session.run_to(0)
    bench.current.bind("stop", session.run_to(location))
    return bench.current.need_stop()


# -- what is asked -------------------------------------------------------------------------------


def test_every_kind_asks_for_fields_that_the_model_has():
    names = {field.name for field in dataclasses.fields(EditModel)}

    assert {name for kind in KINDS.values() for name in kind.fields} <= names
    assert all(("strength" in kind.fields) == (kind.span is not None) for kind in KINDS.values())
    assert {kind.verb for kind in KINDS.values()} == set(edit_verbs.CHANGES)
    assert all(low <= start <= high for low, high, start, _ in
               (kind.span for kind in KINDS.values() if kind.span))  # fmt: skip


def test_what_a_tensor_has_not_is_off_with_the_reason(server):
    model = server.client.model
    plain, headed = (Target.at(model, name) for name in
                     ("layers.2.output", "layers.2.attention.heads"))  # fmt: skip
    pattern = Target.at(model, "layers.2.attention.pattern")

    assert (plain.heads, plain.width, headed.heads, headed.width) == (None, HIDDEN, 4, 8)
    assert plain.off("scale") == {"heads": f"layers.2.output has no heads: it is {plain.shape}"}
    assert headed.off("scale") == {} and headed.off("add a vector") == {}
    assert list(pattern.off("zero")) == ["channels"]
    assert list(plain.off("mean over tokens")) == ["heads", "sticky"]
    assert not plain.off("force")


def test_the_kinds_offered_are_those_that_make_sense_there(server):
    model = server.client.model
    plain, logits, pattern = (Target.at(model, name) for name in
                              ("layers.2.output", "logits", PATTERN))  # fmt: skip

    assert set(plain.kinds) == set(KINDS) - set(TOKEN_KINDS)
    assert logits.kinds[:3] == TOKEN_KINDS and logits.width == VOCABULARY
    assert not set(logits.kinds) & {*OF_VECTORS, *ABLATIONS, "swap two tokens"}
    assert not set(pattern.kinds) & set(OF_VECTORS) and "zero" in pattern.kinds
    assert plain.ahead["ablate heads"] == (3, 4, 5)
    assert pattern.ahead["ablate heads"] == (2, 3, 4, 5)
    last = Target.at(model, f"layers.{NUM_LAYERS - 1}.output")
    assert not set(last.kinds) & set(ABLATIONS)


# -- what it becomes -----------------------------------------------------------------------------

#: where, the fields, and the Python
MADE: tuple[tuple[object, EditModel, str], ...] = (
    (2, EditModel("scale", 0.5), "stop.edit(scale=0.5, tokens=-1)"),
    (2, EditModel("scale", 0.5, tokens="chosen", chosen_token=3), "stop.edit(scale=0.5, tokens=3)"),
    (2, EditModel("scale", -1, tokens="2:5", channels="[3, 7]"),
     "stop.edit(scale=-1, tokens=slice(2, 5, None), channels=[3, 7])"),
    (2, EditModel("add a number", 2.0, tokens="all", channels="0:4"),
     "stop.edit(add=2.0, tokens='all', channels=slice(0, 4, None))"),
    (2, EditModel("add a vector", 4.0, vector="up", sticky=True),
     "stop.edit(vector='up', alpha=4.0, tokens=-1, sticky=True)"),
    (2, EditModel("project out a vector", vector="up", tokens="prompt"),
     "stop.edit(project_out='up', tokens='prompt')"),
    (2, EditModel("set to a number", 0.25, tokens="0, 2"), "stop.edit(set=0.25, tokens=[0, 2])"),
    (2, EditModel("zero", tokens=" Mary"), "stop.edit(zero=True, tokens=' Mary')"),
    (2, EditModel("clamp", least="-1", largest="0.5", tokens="last"),
     "stop.edit(clamp=(-1.0, 0.5), tokens=-1)"),
    (2, EditModel("clamp", largest="0.5"), "stop.edit(clamp=(None, 0.5), tokens=-1)"),
    (2, EditModel("mean over tokens", tokens="all"), "stop.edit(mean=True, tokens='all')"),
    (2, EditModel("swap two tokens", first="1", second="last"),
     "stop.edit(swap=True, tokens=[1, -1])"),
    ("layers.2.attention.heads", EditModel("scale", 0.0, heads="1"),
     "stop.edit(scale=0.0, tokens=-1, heads=1)"),
    ("layers.2.attention.heads", EditModel("zero", heads="chosen", channels=":4", chosen_head=2),
     "stop.edit(zero=True, tokens=-1, heads=2, channels=slice(None, 4, None))"),
    ("layers.2.attention.pattern", EditModel("zero", tokens="all", heads="[0, 3]"),
     "stop.edit(zero=True, tokens='all', heads=[0, 3])"),
    (2, EditModel("ablate heads", layer=3, ablated="1, 2"),
     "stop.ablate(layer=3, heads=[1, 2], tokens=-1)"),
    (2, EditModel("ablate neurons", layer=4, ablated="0:16", mean=True, tokens="all"),
     "stop.ablate(layer=4, neurons=slice(0, 16, None), mean=True, tokens='all')"),
    ("logits", EditModel("force", token_text="' Mary'"), "stop.edit(force=' Mary')"),
    ("logits", EditModel("ban", token_text="[' Mary', ' John']"),
     "stop.edit(ban=[' Mary', ' John'])"),
    ("logits", EditModel("ban", token_text="id 7", sticky=True), "stop.edit(ban=7, sticky=True)"),
    ("logits", EditModel("replace", token_text=" Mary", instead=" John"),
     "stop.edit(replace=(' Mary', ' John'))"),
    ("logits", EditModel("scale", 2.0), "stop.edit(scale=2.0, tokens=-1)"),
)  # fmt: skip


def _alike(clicked: Workbench, typed: Workbench) -> None:
    """Both sessions have the same edits, the same value here, and end alike."""
    one, two = clicked.current.need_session(), typed.current.need_session()
    kept = [
        [dataclasses.replace(edit, description="") for edit in session.refresh().edits]
        for session in (one, two)
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 1
    values = [bench.current.need_stop().value.numpy() for bench in (clicked, typed)]
    np.testing.assert_array_equal(*values)
    for session in (one, two):
        session.continue_()
    np.testing.assert_array_equal(one.logits, two.logits)
    assert one.tokens == two.tokens


@pytest.mark.usefixtures("up")
@pytest.mark.parametrize(("where", "model", "code"), MADE, ids=[code for *_, code in MADE])
def test_a_click_is_the_python_it_records_and_the_preview_shown_before(
    make_bench: MakeBench, where: object, model: EditModel, code: str
):
    (clicked, _), (typed, shell) = make_bench(), make_bench()
    stop = _stand(clicked, where)
    _stand(typed, where)
    wishes = model.wishes()
    found = edit_verbs.preview(clicked, stop, model.verb, wishes, top_k=3)
    expected = found.logits_after
    assert not stop.session.edits

    verbs.perform(clicked, model.verb, **wishes).result(60)
    assert [*clicked.actions.values()][-1].code == code
    ran = shell.run_cell(code)
    assert ran.error_before_exec is None and ran.error_in_exec is None

    [edit] = stop.session.edits
    assert found.elements_changed == edit.elements_changed or model.kind in ABLATIONS
    assert edit.sticky == model.sticky
    fork = stop.session.fork()
    np.testing.assert_array_equal(_next_logits(fork), expected)
    _alike(clicked, typed)


def _next_logits(session: djinn.Session) -> Any:
    """The logits of the forward it stands in, edits included; the session ends."""
    if session.location != "logits":
        session.run_to("logits")
    found = session.stop.value.numpy()[0]
    session.terminate()
    return found


@pytest.mark.parametrize(
    ("where", "source", "rows", "more", "code"),
    [
        (2, 2, "", {}, "stop.edit(patch=server.attach({id!r}).stop.value[-1], tokens=-1)"),
        (2, 2, "3", {"tokens": "5"},
         "stop.edit(patch=server.attach({id!r}).stop.value[3], tokens=5)"),
        (2, 4, "all", {"tokens": "all", "channels": "0:8"},
         "stop.edit(patch=server.attach({id!r}).stop.value[:, 0:8], tokens='all',"
         " channels=slice(0, 8, None))"),
        ("layers.2.attention.heads", "layers.2.attention.heads", "", {"heads": "[1, 2]"},
         "stop.edit(patch=server.attach({id!r}).stop.value[-1, [1, 2]], tokens=-1, heads=[1, 2])"),
        ("logits", "logits", "", {}, "stop.edit(patch=server.attach({id!r}).stop.value[-1],"
         " tokens=-1)"),
    ],
)  # fmt: skip
def test_a_patch_comes_from_another_session(make_bench: MakeBench, where, source, rows, more, code):
    (clicked, _), (typed, shell) = make_bench(), make_bench()
    other = clicked.current.need_server().launch(
        PROMPT.replace("John gave", "Mary gave"), max_new_tokens=3
    )
    there = other.run_to(source).value.numpy()
    stop = _stand(clicked, where)
    _stand(typed, where)
    model = EditModel("patch", source=other.id, rows=rows, **more)

    found = edit_verbs.preview(clicked, stop, model.verb, model.wishes(), top_k=3)
    verbs.perform(clicked, model.verb, **model.wishes()).result(60)
    written = [*clicked.actions.values()][-1].code
    assert written == code.format(id=other.id)
    assert shell.run_cell(written).error_in_exec is None

    assert stop.session.edits[0].elements_changed == found.elements_changed > 0
    if (rows, where) == ("3", 2):
        np.testing.assert_array_equal(stop.value[5].numpy(), there[3])
    _alike(clicked, typed)


def test_a_patch_comes_from_a_node_of_the_tree(make_bench: MakeBench):
    (clicked, _), (typed, shell) = make_bench(), make_bench()
    stops = [_stand(bench, 2) for bench in (clicked, typed)]
    session = stops[0].session
    node = next(n for n in session.branches() if n.location == "layers.0.output")
    known = set(clicked.current.need_server().sessions().index)
    model = EditModel("patch", source=node.number, tokens="2:6")

    found = edit_verbs.preview(clicked, stops[0], model.verb, model.wishes(), top_k=3)
    verbs.perform(clicked, model.verb, **model.wishes()).result(60)
    code = [*clicked.actions.values()][-1].code
    assert code == (
        "other = session.fork()\n"
        f"stop.edit(patch=other.go_to({node.number}).value[2:6],"
        " tokens=slice(2, 6, None))\nother.terminate()"
    )
    assert shell.run_cell(code).error_in_exec is None

    assert set(clicked.current.need_server().sessions().index) == known
    assert session.edits[0].elements_changed == found.elements_changed > 0
    edited = stops[0].value.numpy()
    session.step_back()
    np.testing.assert_array_equal(session.stop.value[2:6].numpy(), edited[2:6])
    session.go_to(stops[0])
    for bench in (clicked, typed):
        bench.current.bind("stop", bench.current.need_session().stop)
    _alike(clicked, typed)


def test_positions_are_the_session_s_own_also_where_one_token_is_fed(make_bench: MakeBench):
    clicked, _ = make_bench()
    stop = _stand(clicked, 2)
    other = stop.session.fork()
    other.break_at(2, when="decode")
    other.continue_()
    last = len(other.tokens) - 1

    first = EditModel("patch", source=other.id, rows=str(last)).wishes()
    edit_verbs.preview(clicked, stop, "patch", first, top_k=3)
    with pytest.raises(errors.BadArgument, match=rf"token 3 was fed before.*from {last} on"):
        edit_verbs.preview(
            clicked, stop, "patch", EditModel("patch", source=other.id, rows="3").wishes(), top_k=3
        )


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (EditModel("scale", tokens=""), "tokens: write"),
        (EditModel("scale", tokens="chosen"), "panel of tokens"),
        (EditModel("scale", tokens="::0"), "step"),
        (EditModel("scale", tokens="[]"), "empty"),
        (EditModel("scale", tokens="[1, "), None),  # may be a token's text
        (EditModel("scale", heads="two"), "heads: write"),
        (EditModel("scale", heads="chosen"), "panel of attention"),
        (EditModel("scale", channels="0.5"), "channels"),
        (EditModel("add a vector"), "choose a named vector"),
        (EditModel("clamp"), "least, the largest"),
        (EditModel("clamp", least="low"), "least: write a number"),
        (EditModel("clamp", least="nan"), "least: write a number"),
        (EditModel("swap two tokens", first="1"), "second: write"),
        (EditModel("swap two tokens", first="1:3", second="2"), "first: a swap"),
        (EditModel("ablate heads", ablated="1"), "no layer ahead"),
        (EditModel("ablate heads", layer=3), "heads: write"),
        (EditModel("patch"), "choose where the patch"),
        (EditModel("force"), "leading space"),
        (EditModel("replace", token_text=" Mary"), "leading space"),
        (EditModel("replace", token_text=" Mary", instead="id 4"), "both tokens as texts"),
        (EditModel("sharpen"), "no such kind"),
    ],
)
def test_what_cannot_be_read_says_what_is_wanted(model: EditModel, said: str | None):
    if said is None:
        assert model.wishes()["tokens"] == "[1, "
        return
    with pytest.raises((errors.BadArgument, errors.BadSelector), match=said):
        model.wishes()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("last", -1), ("chosen", 4), ("'last'", "last"), ("(0, 2)", [0, 2]), (" :", slice(None)),
     ("' :'", " :"), (" Mary", " Mary"), ("generated", "generated")],
)  # fmt: skip
def test_words_select_and_quotes_make_them_texts(text: str, expected: object):
    words = ("all", "prompt", "generated")

    assert selection(text, "tokens", words=words, chosen=4) == expected


def test_numbers_and_tokens_are_read_as_typed():
    assert (bound("", "least"), bound("1e-3", "least")) == (None, 0.001)
    assert next_tokens(" Mary", several=False) == " Mary"
    assert next_tokens("[1, 2]", several=True) == [1, 2]
    assert next_tokens("[1, 2]", several=False) == "[1, 2]"
    assert next_tokens("id 12 apples", several=False) == "id 12 apples"
    assert next_tokens("'", several=False) == "'"


@pytest.mark.parametrize(
    ("verb", "given"),
    [
        ("patch", {"tokens": -1}),
        ("patch", {"session": "s1", "node": 1, "tokens": -1}),
        ("patch", {"session": "nobody", "tokens": -1}),
        ("patch", {"node": 999, "tokens": -1}),
        ("patch", {"node": 1, "tokens": "prompt"}),
    ],
)
def test_a_patch_from_nowhere_is_refused_and_changes_nothing(
    make_bench: MakeBench, verb: str, given: dict[str, Any]
):
    bench, _ = make_bench()
    stop = _stand(bench, 2)

    with pytest.raises(errors.DjinnError):
        verbs.perform(bench, verb, **given)
    assert not bench.actions and not stop.session.refresh().edits


def test_a_session_that_ran_on_is_no_source_of_a_patch(make_bench: MakeBench):
    bench, _ = make_bench()
    stop = _stand(bench, 2)
    other = stop.session.fork()
    other.continue_()

    with pytest.raises(errors.NotStopped, match=r"is finished.*run it to a place"):
        verbs.perform(bench, "patch", session=other.id, tokens=-1)


def test_what_has_no_preview_is_not_previewed(make_bench: MakeBench):
    bench, _ = make_bench()
    stop = _stand(bench, 2)

    with pytest.raises(errors.BadArgument, match="edit, ablate, patch can"):
        edit_verbs.preview(bench, stop, "undo", {}, top_k=3)
