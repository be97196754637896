"""What a click does and what its recorded Python does are the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

import djinn_nb as djinn
from djinn_nb import errors, verbs
from djinn_nb.workbench import Workbench, workbench
from tests.djinn_nb.conftest import PROMPT

Step = tuple[str, dict[str, Any]]

#: A working day in clicks: every verb that needs no second server.
DAY: tuple[Step, ...] = (
    ("set_breakpoint", {"location": 2, "condition": "norm > 0"}),
    ("toggle_breakpoint", {"location": "layers.4.output"}),
    ("launch", {"prompt": PROMPT, "max_new_tokens": 3, "temperature": 0.5, "seed": 3}),
    ("next", {}),
    ("step_in", {}),
    ("run_to", {"location": 4}),
    ("edit", {"scale": 0.5, "tokens": -1}),
    ("edit", {"zero": True, "tokens": [0, 1], "sticky": True}),
    ("enable_edit", {"id": 2, "enabled": False}),
    ("remove_edit", {"id": 2}),
    ("undo", {}),
    ("ablate", {"layer": 5, "heads": [0, 2], "tokens": -1}),
    ("undo", {}),
    ("edit", {"scale": 0.25, "tokens": -1}),
    ("toggle_breakpoint", {"location": 2}),
    ("set_breakpoint", {"location": 3, "when": "decode", "once": True, "ignore": 1}),
    ("enable_breakpoint", {"id": 2, "enabled": False}),
    ("remove_breakpoint", {"id": 2}),
    ("step_out", {}),
    ("step_back", {}),
    ("go_to", {"node": 2}),
    ("rewind", {"forward": 0, "location": "layers.1.middle"}),
    ("look", {}),
    ("fork", {"seed": 7}),
    ("continue", {}),
    ("clear_breakpoints", {}),
    ("continue", {}),
)


@pytest.fixture
def make_bench(
    make_shell: Callable[[], InteractiveShell], server: djinn.Server
) -> Callable[[], tuple[Workbench, InteractiveShell]]:
    def make() -> tuple[Workbench, InteractiveShell]:
        shell = make_shell()
        bench = workbench(shell)
        bench.current.bind("server", server)
        return bench, shell

    return make


def _state(bench: Workbench) -> dict[str, Any]:
    """Where the session stands and what it has, but for names and numbers of its own."""
    info = dataclasses.asdict(bench.current.session.refresh())
    for own in ("id", "name", "parent", "revision", "event_seq", "kv_bytes", "num_pages",
                "device_pages", "host_pages", "disk_pages"):  # fmt: skip
        del info[own]
    return info | {"pending": list(bench.current.pending), "stop": _place(bench)}


def _place(bench: Workbench) -> str | None:
    stop = bench.current.stop
    return None if stop is None else stop.location


def test_a_day_of_clicks_and_the_python_recorded_of_it_end_alike(make_bench) -> None:
    clicked, _ = make_bench()
    typed, shell = make_bench()
    for verb, given in DAY:
        verbs.perform(clicked, verb, **given).result(60)
        code = [*clicked.actions.values()][-1].code
        ran = shell.run_cell(code)

        assert ran.error_before_exec is None and ran.error_in_exec is None, (verb, code)
        if clicked.current.session is not None:
            assert _state(typed) == _state(clicked), (verb, code)

    assert clicked.current.session.status == "finished"
    rest = {"connect", "attach", "pause", "prune", "terminate", "evict", "restore", "pin",
            "patch", "make_vector", "keep_vector", "remove_vector", "strength_curve"}  # fmt: skip
    assert set(verbs.VERBS) - {verb for verb, _ in DAY} == rest


def test_every_other_verb_does_what_its_code_does(make_bench, server) -> None:
    bench, _ = make_bench()
    session = server.launch(PROMPT, max_new_tokens=4)
    session.run_to(1)
    verbs.perform(bench, "attach", session=session.id).result(60)
    assert bench.current.session.id == session.id
    verbs.perform(bench, "pin", pinned=True).result(60)
    assert bench.current.session.refresh().pinned
    verbs.perform(bench, "pin", pinned=False).result(60)
    assert not bench.current.session.refresh().pinned
    verbs.perform(bench, "next").result(60)
    verbs.perform(bench, "step_back").result(60)
    before = len(bench.current.session.branches())
    node = max(n.number for n in bench.current.session.branches())
    verbs.perform(bench, "prune", node=node).result(60)
    assert len(bench.current.session.branches()) == before - 1
    verbs.perform(bench, "terminate").result(60)
    with pytest.raises(errors.UnknownSession):
        server.attach(session.id)


@pytest.mark.parametrize(
    ("verb", "given"),
    [
        ("no_such_verb", {}),
        ("next", {"surprise": 1}),
        ("toggle_breakpoint", {"location": "layers.99.output"}),
        ("set_breakpoint", {"location": 1, "condition": "norm >"}),
        ("set_breakpoint", {"location": 1, "when": "sometimes"}),
        ("launch", {"prompt": ""}),
        ("launch", {"prompt": PROMPT, "max_new_tokens": 0}),
        ("go_to", {"node": -1}),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_recorded(make_bench, verb, given) -> None:
    bench, _ = make_bench()
    bench.current.bind("session", bench.current.server.launch(PROMPT, max_new_tokens=2))

    with pytest.raises(errors.DjinnError):
        verbs.perform(bench, verb, **given)
    assert not bench.actions
