"""The public promise: these names, these signatures and these magics stay as they are.

Written out by hand, so that a change here is a change that users meet and the changelog names.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import djinn_nb as djinn
from djinn_nb.notebook import load_ipython_extension, unload_ipython_extension
from tests.system.conftest import PROMPT, World

SIGNATURES = {
    "connect": "(address=None, *, token=None, model=None, device=None, dtype=None, **options)",
    "Server.launch": "(self, prompt=None, *, max_new_tokens, temperature=0, top_p=1, seed=None,"
    " stop_on_entry=False, add_special_tokens=True, name=None, messages=None)",
    "Server.attach": "(self, id, *, inexact=False)",
    "Server.sessions": "(self)",
    "Server.memory": "(self)",
    "Server.set_budget": "(self, *, device=None, host=None, disk=None)",
    "Server.swaps": "(self)",
    "Server.close": "(self)",
    "Session.break_at": "(self, location, *, when='any', condition=None, ignore=0, once=False)",
    "Session.continue_": "(self, timeout=None)",
    "Session.next": "(self, timeout=None)",
    "Session.step_in": "(self, timeout=None)",
    "Session.step_out": "(self, timeout=None)",
    "Session.run_to": "(self, location, timeout=None)",
    "Session.step_back": "(self, timeout=None)",
    "Session.rewind": "(self, forward, location, timeout=None)",
    "Session.branches": "(self)",
    "Session.go_to": "(self, node, timeout=None)",
    "Session.prune": "(self, node)",
    "Session.pause": "(self)",
    "Session.wait": "(self, timeout=None)",
    "Session.fork": "(self, seed=None, *, name=None, temperature=None, top_p=None,"
    " max_new_tokens=None)",
    "Session.capture": "(self, locations, what='summary', tokens='all')",
    "Session.evict": "(self, to='host')",
    "Session.restore": "(self)",
    "Session.pin": "(self, pinned=True)",
    "Session.hint": "(self, *, resume_in_s)",
    "Session.terminate": "(self)",
    "Session.story": "(self)",
    "Stopped.edit": "(self, *, scale=None, add=None, set=None, zero=False, clamp=None,"
    " project_out=None, mean=False, swap=False, patch=None, vector=None, force=None, ban=None,"
    " replace=None, alpha=1.0, tokens='all', heads=None, channels=None, sticky=False,"
    " location=None, inexact=False)",
    "Stopped.lens": "(self, top_k=5, tokens=-1, layers=None)",
    "Session.save": "(self, path)",
    "Server.load": "(self, path, *, name=None, inexact=False)",
    "Stopped.undo": "(self)",
    "Stopped.preview": "(self, *edits, top_k=10, metric=None, **edit)",
    "Stopped.attention": "(self, layer=None, head=None, tokens=None)",
    "Stopped.attribution": "(self, token=None, against=None)",
    "Stopped.router": "(self, layer=None)",
    "Stopped.capture": "(self, span='forward')",
}
PROPERTIES = {
    "Server": ["address", "model"],
    "Session": [
        "breakpoints", "edits", "tokens", "text", "logits", "status", "layers_executed",
        "residency",
    ],
    "Stopped": ["location", "reason", "forward", "hit_tokens", "tokens", "hidden_states", "value"],
}  # fmt: skip
LINE_MAGICS = [
    "connect", "load", "break", "breaks", "continue", "next", "in", "out", "back", "pause", "edit",
    "lens", "fork", "sessions", "memory", "help",
]  # fmt: skip


def _public(dotted: str) -> Any:
    found: Any = djinn
    for name in dotted.split("."):
        found = getattr(found, name)
    return found


@pytest.fixture
def session(world: World) -> Iterator[djinn.Session]:
    made = world.launch(max_new_tokens=3, name="promised")
    yield made
    made.terminate()


@pytest.fixture
def magics() -> Iterator[dict[str, dict[str, Any]]]:
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell(config=config)
    load_ipython_extension(shell)
    yield shell.magics_manager.magics
    unload_ipython_extension(shell)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_call_has_the_arguments_promised(name: str) -> None:
    found = inspect.signature(_public(name))

    bare = [one.replace(annotation=inspect.Parameter.empty) for one in found.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


@pytest.mark.parametrize("owner", PROPERTIES)
def test_attributes_promised_are_properties_with_a_docstring(owner: str) -> None:
    for name in PROPERTIES[owner]:
        found = inspect.getattr_static(_public(owner), name)

        assert isinstance(found, property), name
        assert found.__doc__, name


def test_the_magics_promised_are_there_with_their_flags(magics: dict[str, dict[str, Any]]) -> None:
    assert set(LINE_MAGICS) <= {name.removeprefix("djinn_") for name in magics["line"]}
    assert "djinn_run" in magics["cell"]
    assert "djinn_run" not in magics["line"]
    usage = magics["line"]["djinn_break"].parser.format_help()
    for flag in ("--if", "--when", "--once", "--ignore"):
        assert flag in usage


def test_values_have_the_types_promised(world: World, session: djinn.Session) -> None:
    server = world.server
    assert session.logits is None
    point = session.break_at(2, when="prefill", condition="norm > 0", ignore=0, once=True)
    stop = session.continue_()

    assert isinstance(stop, djinn.Stopped)
    assert (stop.location, stop.reason, stop.forward) == ("layers.2.output", "breakpoint", 0)
    assert stop.hit_tokens == list(range(len(session.tokens)))
    assert session.layers_executed == 3
    assert stop.hidden_states.numpy().shape == (len(stop.tokens), server.model.hidden_size)
    assert isinstance(stop.lens(top_k=2), pd.DataFrame)
    assert isinstance(stop.edit(scale=1.0), djinn.Edit)
    assert [one.id for one in session.breakpoints] == [point.id]
    assert len(session.edits) == 1
    assert isinstance(session.next(), djinn.Stopped)
    session.fork(seed=1, temperature=0.8).terminate()
    assert isinstance(session.continue_(), djinn.Finished)
    assert session.logits.shape == (server.model.vocab_size,)
    assert session.logits.dtype == np.float32
    assert session.text.startswith(PROMPT)
    assert session.tokens[: len(stop.tokens)] == [token.id for token in stop.tokens]
    assert session.status == "finished"
    assert session.story()


def test_tables_are_data_frames_and_the_model_describes_itself(world: World) -> None:
    server = world.server
    session = world.launch()

    assert isinstance(server.sessions(), pd.DataFrame)
    assert isinstance(server.memory(), pd.DataFrame)
    assert server.attach(session.id).id == session.id
    assert server.model.config["num_hidden_layers"] == server.model.num_layers
    assert server.model.tokenizer.decode(session.tokens) == PROMPT
    assert "[" in server.model.modules["model.embed_tokens"]
    session.terminate()


def test_a_server_is_a_context_manager_and_its_sessions_stay(world: World) -> None:
    with world.connect() as server:
        session = server.launch([1, 2], max_new_tokens=1)
        assert server.address == world.process.address

    with pytest.raises(djinn.DjinnError):
        server.sessions()
    world.server.attach(session.id).terminate()
