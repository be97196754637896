"""The library of named vectors in the panel of edits: its list, and what its buttons record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell

import djinn_nb as djinn
from djinn_nb import errors, verbs
from djinn_nb.panels.edit import EditPanel
from djinn_nb.panels.library_model import (
    LibraryModel,
    VectorRow,
    lines_of,
    numbers,
    provenance_text,
    rows_of,
)
from djinn_nb.workbench import Workbench, workbench
from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from tests.djinn_nb.conftest import HIDDEN, PROMPT

Until = Callable[[Callable[[], bool]], None]
GOOD = "Mary gave a drink to\nMary went to the store\n\n"
BAD = "John gave a drink to\nJohn went to the park"


@pytest.fixture
def bench(make_shell: Callable[[], InteractiveShell], server: djinn.Server) -> Iterator[Workbench]:
    made = workbench(make_shell())
    made.current.bind("server", server)
    yield made
    for name in server.vectors:
        del server.vectors[name]


@pytest.fixture
def stop(bench: Workbench) -> djinn.Stopped:
    session = bench.current.need_server().launch(PROMPT, max_new_tokens=4)
    bench.current.bind("session", session)
    bench.current.bind("stop", session.run_to(2))
    return bench.current.need_stop()


@pytest.fixture
def panel(bench: Workbench, stop: djinn.Stopped, eventually: Until) -> EditPanel:
    made = EditPanel(bench)
    assert made.body is not None
    eventually(lambda: made._target is not None)
    return made


def _is_listed(panel: EditPanel, name: str) -> bool:
    """Whether all of the panel has heard of a vector: the choice of the edit does so last."""
    return name in [value for _, value in panel._vector.options]


def _click_and_type(bench: Workbench, verb: str, given: dict[str, Any]) -> str:
    """Carry a verb out, take away what it made, run its code, and return the code."""
    verbs.perform(bench, verb, **given).result(60)
    code = [*bench.actions.values()][-1].code
    store = bench.current.need_server().vectors
    clicked = store[given["name"]]
    del store[given["name"]]
    ran = bench.current.shell.run_cell(code)
    assert ran.error_before_exec is None and ran.error_in_exec is None
    typed = store[given["name"]]
    np.testing.assert_array_equal(clicked.numpy(), typed.numpy())
    without_date = [{k: v for k, v in one.provenance.items() if k != "date"}
                    for one in (clicked, typed)]  # fmt: skip
    assert without_date[0] == without_date[1] and clicked.location == typed.location
    return code


# -- verbs and their Python ----------------------------------------------------------------------


def test_prompts_make_a_vector_as_their_python_does(bench, stop):
    model = LibraryModel("joy", positive=GOOD, negative=BAD)
    code = _click_and_type(bench, "make_vector", model.from_prompts())
    assert code == (
        "server.vectors.from_prompts('joy', ['Mary gave a drink to', 'Mary went to the store'],"
        " ['John gave a drink to', 'John went to the park'], location='layers.2.output', tokens=-1)"
    )

    model = LibraryModel("joy", GOOD, BAD, location="4", method="pca", tokens="all", replace=True)
    code = _click_and_type(bench, "make_vector", model.from_prompts())
    assert code.endswith(
        "location='layers.4.output', method='pca', tokens='all', replace=True)"
    )  # fmt: skip


def test_the_chosen_token_of_a_stop_is_kept_as_its_python_does(bench, stop):
    model = LibraryModel("here", tokens="chosen", chosen_token=3)
    code = _click_and_type(bench, "keep_vector", model.from_stop())

    assert code == "server.vectors.from_stop('here', stop, tokens=3)"
    kept = bench.current.need_server().vectors["here"].numpy()
    np.testing.assert_array_equal(kept, stop.value[3].numpy())


def test_a_strength_curve_is_its_python(bench, stop):
    verbs.perform(bench, "keep_vector", name="here", tokens=3).result(60)
    given = LibraryModel(alphas="0, 1", token_text="' Mary'").curve("here")
    clicked = verbs.perform(bench, "strength_curve", **given).result(60)
    code = [*bench.actions.values()][-1].code
    assert code == (
        "from djinn_nb.metrics import Probability\n"
        f"curve = server.vectors['here'].strength_curve([session.tokens[:{len(stop.tokens)}]],"
        " [0.0, 1.0], Probability(' Mary'), max_new_tokens=8)"
    )
    assert bench.current.shell.run_cell(code).error_in_exec is None

    typed = bench.current.shell.user_ns["curve"]
    assert clicked.frame.equals(typed.frame) and len(typed.frame) == 4


def test_a_removed_vector_is_gone_and_its_python_removes_it(bench, stop):
    store = bench.current.need_server().vectors
    for name in ("one", "two"):
        verbs.perform(bench, "keep_vector", name=name).result(60)
    verbs.perform(bench, "remove_vector", name="one").result(60)
    assert list(store) == ["two"]

    code = [*bench.actions.values()][-1].code.replace("'one'", "'two'")
    assert bench.current.shell.run_cell(code).error_in_exec is None
    assert list(store) == []


@pytest.mark.parametrize(
    ("verb", "given"),
    [
        ("make_vector", {"name": "  ", "positive": ["a"], "negative": ["b"]}),
        ("make_vector", {"name": "joy", "positive": [], "negative": ["b"]}),
        ("make_vector", {"name": "joy", "positive": ["a"], "negative": ["b"], "location": 99}),
        ("keep_vector", {"name": ""}),
        ("remove_vector", {}),
        ("strength_curve", {"name": "joy", "alphas": [1.0], "max_new_tokens": 0}),
    ],
)
def test_what_is_no_vector_is_refused_before_anything_is_recorded(bench, stop, verb, given):
    with pytest.raises(errors.DjinnError):
        verbs.perform(bench, verb, **given)
    assert not bench.actions


# -- what is typed and listed --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: LibraryModel(positive="a", negative="b").from_prompts(), "write a name"),
        (lambda: LibraryModel("joy", " \n", "b").from_prompts(), "one positive prompt"),
        (lambda: LibraryModel("joy", "a").from_prompts(), "one negative prompt"),
        (lambda: LibraryModel("joy", tokens="").from_stop(), "tokens: write"),
        (lambda: LibraryModel("joy", tokens="chosen").from_stop(), "nothing is chosen"),
        (lambda: LibraryModel(alphas="1").curve(""), "choose the vector"),
        (lambda: LibraryModel(alphas="one").curve("joy"), "strengths: write numbers"),
        (lambda: LibraryModel(alphas="1 " * 26).curve("joy"), "25 is the most"),
    ],
)
def test_what_is_missing_is_named(ask: Callable[[], object], said: str):
    with pytest.raises(errors.BadArgument, match=said):
        ask()


def test_prompts_are_lines_and_strengths_numbers():
    assert lines_of("a\n\n b \n  \n") == ["a", " b "]
    assert numbers("-1, 0\t2.5") == [-1, 0, 2.5]


def test_the_list_says_how_a_vector_was_made_and_on_which_weights(bench, stop, panel, eventually):
    server = bench.current.need_server()
    server.vectors.from_stop("ours", stop, tokens=3)
    foreign = m.StoreVector(
        name="theirs", value=Array.from_numpy(np.ones(HIDDEN, np.float32)),
        location="layers.2.output", model="another-model", weights="0" * 64, provenance={},
    )  # fmt: skip
    server.client.call(foreign, m.VectorReply)
    [ours, theirs] = rows_of(server.vectors)
    assert (ours.method, ours.location, ours.usable, ours.width) == (
        "stop", "layers.2.output", True, HIDDEN
    )  # fmt: skip
    assert not theirs.usable and theirs.text == "theirs (made on another-model)"

    panel._library.toggle.value = True
    eventually(lambda: "theirs" in panel._library._list.value and _is_listed(panel, "theirs"))
    html = panel._repr_mimebundle_()["text/html"]
    assert "these weights" in html and "made on another-model" in html
    panel._library._which.value = "theirs"
    panel._library._take.click()
    assert (panel._kind.value, panel._vector.value) == ("add a vector", "theirs")
    assert panel._inexact.layout.display is None  # it is asked whether it may be used
    panel._strength.value = 2.0
    eventually(lambda: "was made on another-model" in
               panel._refused.value)  # fmt: skip
    panel._inexact.value = True
    eventually(lambda: "numbers changed" in panel._preview.value and not panel._refused.value)
    assert panel.model().wishes()["inexact"] is True


def test_a_vector_is_made_used_measured_and_removed_by_clicks_alone(bench, stop, panel, eventually):
    library = panel._library
    assert library.body.layout.display == "none"
    library.toggle.value = True
    eventually(lambda: "no named vector yet" in library._list.value)
    library._make.click()
    assert "write a name" in library._said.value and not bench.snapshot().actions
    library._name.value, library._positive.value, library._negative.value = "joy", GOOD, BAD
    library._make.click()
    eventually(lambda: "joy" in [row.name for row in library.rows] and _is_listed(panel, "joy"))
    library._make.click()  # what is there is not overwritten
    eventually(lambda: bench.snapshot().notice is not None)
    assert "already" in bench.snapshot().notice.text

    library._which.value = "joy"
    eventually(lambda: "mean difference · tokens -1 · positive" in library._how.value)
    assert "&#x27;Mary gave a drink to&#x27; and 1 more" in library._how.value
    library._take.click()
    panel._strength.value = 2.0
    eventually(lambda: "numbers changed" in panel._preview.value)
    panel._apply.click()
    eventually(lambda: bool(bench.snapshot().edits))
    library._alphas.value, library._token.value = "0, 2", "' Mary'"
    library._measure.click()
    eventually(lambda: "<img" in library._curve.value)
    assert "probability &#x27; Mary&#x27; by strength: joy 0:" in library._curve.value
    assert library._remove.disabled and "joy" in bench.current.need_server().vectors
    library._sure.value = True
    library._remove.click()
    eventually(lambda: not library.rows)
    assert len(bench.current.need_session().refresh().edits) == 1


def test_long_provenance_is_told_in_short():
    told = provenance_text({"method": "mean_difference", "positive": ["x" * 99, "y"],
                            "negative": {"count": 3, "sha256": "a" * 64}, "rows": []})  # fmt: skip

    assert told.startswith("mean difference · positive 'xxx") and "… and 1 more" in told
    assert told.endswith("negative 3 prompts, sha256 aaaaaaaaaaaa · rows none")


def test_a_row_is_plain_data():
    row = VectorRow("a", 4, 1.0, "layers.2.output", "stop", "", usable=True, note="")

    assert row.text == "a" and dataclasses.replace(row, usable=False, note="x").text == "a (x)"
