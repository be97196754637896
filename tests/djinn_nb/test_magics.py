"""The magics in an IPython shell: each reads its line and calls the Python API."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from IPython.core.completer import provisionalcompleter

import djinn_nb as djinn
from djinn_nb import errors
from djinn_nb.completion import Completer
from djinn_nb.magics import DjinnMagics
from djinn_nb.notebook import error_line, load_ipython_extension, unload_ipython_extension
from kernel_server.protocol.location import INNER_SITES
from tests.djinn_nb.conftest import LONG, NUM_LAYERS, PROMPT, Process


@pytest.fixture(scope="module")
def shell() -> Iterator[object]:
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    config = Config()
    config.HistoryManager.enabled = False
    made = InteractiveShell(config=config)
    yield made


@pytest.fixture
def magics(shell, server, process: Process) -> Iterator[DjinnMagics]:
    """Loaded and connected, in an empty notebook."""
    shell.reset()
    load_ipython_extension(shell)
    made = shell.magics_manager.registry["DjinnMagics"]
    shell.run_line_magic("djinn_connect", process.address)
    yield made
    unload_ipython_extension(shell)


@pytest.fixture
def run(shell, magics):
    """Run a line or cell as a notebook would; errors are raised."""

    def call(text: str):
        done = shell.run_cell(text)
        done.raise_error()
        return done.result

    return call


def test_the_first_minute_of_a_notebook(run, shell, capsys):
    run("%djinn_break 3")
    run(f"%%djinn_run --max-new-tokens 3\n{PROMPT}\n")

    stop, session = shell.user_ns["stop"], shell.user_ns["session"]
    shown = capsys.readouterr().out
    assert (stop.location, stop.forward, len(stop.tokens)) == ("layers.3.output", 0, 14)
    assert str(session.tokens) in shown  # the exact ids
    assert "stopped at layers.3.output (breakpoint)" in shown
    assert "lens at position 13" in shown

    run("stop.edit(scale=0.9, tokens=-1)")
    run("%djinn_continue")
    assert shell.user_ns["stop"].forward == 1

    run("%djinn_breaks clear")
    run("%djinn_continue")
    assert isinstance(shell.user_ns["stop"], djinn.Finished)
    assert "finished (max_new_tokens), 3 tokens generated" in capsys.readouterr().out


def test_connecting_says_what_is_served(run, shell, process, capsys):
    run(f"%djinn_connect {process.address}")

    assert "tiny-llama (LlamaForCausalLM)" in capsys.readouterr().out
    assert isinstance(shell.user_ns["server"], djinn.Server)


def test_options_of_a_run_reach_the_session(run, shell):
    run("%%djinn_run --max-new-tokens 2 --temperature 0.7 --top-p 0.9 --seed 5 --name x\nMary")

    info = shell.user_ns["session"].newest
    assert (info.max_new_tokens, info.temperature, info.top_p) == (2, 0.7, 0.9)
    assert (info.seed, info.name) == (5, "x")


def test_a_prompt_of_token_ids(run, shell):
    run("%%djinn_run --ids --max-new-tokens 1\n[1, 2, 3]")

    assert shell.user_ns["session"].tokens[:3] == [1, 2, 3]


def test_spaces_of_a_prompt_are_kept(run, shell, server):
    run("%%djinn_run --max-new-tokens 1\n Mary went \n")

    assert shell.user_ns["session"].newest.tokens[:-1] == tuple(
        server.model.tokenizer.encode(" Mary went ")
    )


def test_a_breakpoint_applies_to_the_session_that_goes_on_and_to_later_runs(run, shell, capsys):
    run("%%djinn_run --max-new-tokens 4 --stop-on-entry\nMary")
    run("""%djinn_break 2 --if 'token == "Mary" and norm > 0' --when prefill --once --ignore 0""")
    assert "in session" in capsys.readouterr().out

    run("%djinn_continue")
    first = shell.user_ns["stop"]
    run("%%djinn_run --max-new-tokens 4\nMary")
    second = shell.user_ns["stop"]

    assert first.location == second.location == "layers.2.output"
    assert first.session.id != second.session.id
    point = second.session.breakpoints[0].info
    assert (point.condition, point.when, point.once) == (
        'token == "Mary" and norm > 0',
        "prefill",
        True,
    )


def test_a_condition_with_a_text_needs_no_quotes_around_it(run, magics):
    run('%djinn_break 1 --if token == " to" and norm > 3')

    assert magics.pending[0].condition == 'token == " to" and norm > 3'


def test_a_condition_needs_no_quotes(run, magics):
    run("%djinn_break 1 --if norm > 3 and position == 2 --once")

    assert magics.pending[0].condition == "norm > 3 and position == 2"
    assert magics.pending[0].once


def test_breakpoints_are_listed_disabled_and_removed(run, magics):
    run("%djinn_break 1")
    run("%djinn_break logits --when decode")
    assert run("%djinn_breaks").location.tolist() == ["layers.1.output", "logits"]

    run("%%djinn_run --max-new-tokens 3\nMary")
    table = run("%djinn_breaks disable 1")
    assert table.enabled.tolist() == [False, True]
    assert table.hits.tolist() == [1, 0]
    run("%djinn_continue")
    assert run("%djinn_breaks remove 1").location.tolist() == ["logits"]

    assert [pending.location for pending in magics.pending] == ["logits"]
    with pytest.raises(errors.UnknownBreakpoint):
        run("%djinn_breaks remove 77")


def test_stepping_magics(run, shell):
    run("%%djinn_run --max-new-tokens 2 --stop-on-entry\nMary")
    places = []
    for line in ("%djinn_next", "%djinn_run_to 3", "%djinn_out", "%djinn_next"):
        run(line)
        places.append(shell.user_ns["stop"].location)

    assert places == ["layers.0.output", "layers.3.output", "logits", "layers.0.output"]


def test_edits_by_literals_and_variables(run, shell):
    run(f"%%djinn_run --max-new-tokens 2 --stop-on-entry\n{PROMPT}")
    before = shell.user_ns["stop"].hidden_states.numpy()
    shell.user_ns["vector"] = np.ones(before.shape[1])

    run("%djinn_edit add=vector alpha=4 tokens=-1")
    run('%djinn_edit zero=True tokens=" Mary" channels=0:4')
    run("%djinn_edit scale=2 tokens=prompt location=layers.2.output sticky=True")

    after = shell.user_ns["stop"].hidden_states.numpy()
    np.testing.assert_allclose(after[-1], before[-1] + 4, rtol=1e-5)
    assert (after[1, :4] == 0).all()
    np.testing.assert_array_equal(after[2:-1], before[2:-1])
    assert [edit.kind for edit in shell.user_ns["session"].edits] == ["add", "zero", "scale"]

    run("%djinn_edits disable 1")
    np.testing.assert_array_equal(shell.user_ns["stop"].hidden_states[-1].numpy(), before[-1])
    run("%djinn_undo")
    assert [edit.kind for edit in shell.user_ns["session"].edits] == ["add", "zero"]


@pytest.mark.parametrize(
    "line",
    ["%djinn_edit", "%djinn_edit scale=2 size=3", "%djinn_edit scale = 2",
     "%djinn_edit add=nothing", "%djinn_edit add=open('x')", "%djinn_edit scale=2 tokens=Mary",
     "%djinn_edits remove 9", "%djinn_edits remove", "%djinn_lens --layers some"],
)  # fmt: skip
def test_a_bad_line_is_a_typed_error_and_edits_nothing(run, shell, line):
    run("%%djinn_run --max-new-tokens 2 --stop-on-entry\nMary")

    with pytest.raises(errors.RequestError):
        run(line)

    assert shell.user_ns["session"].edits == []


def test_tables(run, shell):
    run("%%djinn_run --max-new-tokens 2 --stop-on-entry\nMary")

    for line in ("%djinn_lens --top-k 2", "%djinn_sessions", "%djinn_memory", "%djinn_breaks"):
        assert isinstance(run(line), pd.DataFrame)
    assert len(run("%djinn_lens --layers all --top-k 1")) == 1


def test_fork_attach_and_terminate_change_the_current_session(run, shell, capsys):
    run("%%djinn_run --max-new-tokens 2 --stop-on-entry --name parent\nMary")
    parent = shell.user_ns["session"]

    run("%djinn_fork --name child")
    child = shell.user_ns["session"]
    assert child.parent == parent.id
    assert shell.user_ns["stop"].session is child
    run("%djinn_terminate")
    assert "terminated" in capsys.readouterr().out
    run("%djinn_attach parent")

    assert shell.user_ns["session"].id == parent.id
    run("%djinn_story")
    assert "Launch" in capsys.readouterr().out


def test_sessions_made_in_python_are_the_magics_sessions_too(run, shell):
    run("session = server.launch([1, 2, 3], max_new_tokens=2)")
    run("%djinn_break 1")
    run("%djinn_continue")

    assert shell.user_ns["stop"].session is shell.user_ns["session"]
    assert shell.user_ns["stop"].location == "layers.1.output"


def test_a_variable_of_the_users_is_kept_and_it_is_said_once(run, shell, capsys):
    run("stop = 'mine'")
    run("%%djinn_run --max-new-tokens 2 --stop-on-entry\nMary")
    run("%djinn_next")

    assert shell.user_ns["stop"] == "mine"
    assert isinstance(shell.user_ns["djinn_stop"], djinn.Stopped)
    assert capsys.readouterr().out.count("is a variable of yours (str) and is kept") == 1
    run("%djinn_edit scale=2")


def test_binding_can_be_switched_off(run, shell, magics):
    magics.bind_names = False
    try:
        run("%%djinn_run --max-new-tokens 2 --stop-on-entry\nMary")

        assert "session" not in shell.user_ns
        assert magics.session is not None
    finally:
        magics.bind_names = True


def test_a_breakpoint_that_cannot_be_set_leaves_no_session(run, server):
    run("""%djinn_break 1 --if 'token == "no such token"'""")

    with pytest.raises(errors.BadCondition):
        run("%%djinn_run --max-new-tokens 2\nMary")

    assert server.sessions().empty


def test_a_timeout_leaves_the_session_running_and_pause_stops_it(run, shell, capsys):
    with pytest.raises(errors.StillRunning):
        run(f"%%djinn_run --max-new-tokens {LONG} --timeout 0.1\nMary")

    run("%djinn_pause")

    assert shell.user_ns["stop"].reason == "pause"


def test_without_a_connection_or_session_the_next_move_is_said(shell):
    shell.reset()
    load_ipython_extension(shell)
    try:
        for line, move in (
            ("%djinn_sessions", "%djinn_connect"),
            ("%djinn_continue", "%%djinn_run"),
            ("%djinn_edit scale=2", "%%djinn_run"),
        ):
            done = shell.run_cell(line)
            assert isinstance(done.error_in_exec, errors.DjinnError)
            assert move in str(done.error_in_exec)
    finally:
        unload_ipython_extension(shell)


def test_an_error_is_one_line_and_the_whole_trace_under_debug(run, shell, capsys, monkeypatch):
    shell.run_cell("%djinn_break 99")
    short = capsys.readouterr()
    assert (short.out + short.err).strip().splitlines() == [
        f"UnknownLocation: 99: the model has {NUM_LAYERS} layers, numbered 0 to {NUM_LAYERS - 1}"
    ]

    monkeypatch.setenv("DJINN_DEBUG", "0")
    run("%djinn_debug on")
    shell.run_cell("%djinn_break 99")
    assert "Traceback" in capsys.readouterr().out
    run("%djinn_debug off")
    shell.run_cell("%djinn_break 99")

    assert "Traceback" not in capsys.readouterr().out


def test_a_usage_mistake_shows_the_usage(shell, magics, capsys):
    shell.run_cell("%djinn_break")

    shown = capsys.readouterr()
    assert "location" in shown.err + shown.out
    assert "usage: %djinn_break" in shown.err + shown.out


def test_the_line_of_a_cell_is_named():
    from kernel_server.protocol.errors import BadEdit

    source = "x = 1\nraise error"
    error = BadEdit("no")
    try:
        exec(compile(source, "<ipython-input-1-x>", "exec"), {"error": error})
    except BadEdit as caught:
        assert error_line(caught) == "BadEdit: no (line 2 of the cell)"


def test_looking_magics_give_what_the_calls_give(run, shell):
    run(f"%%djinn_run --stop-on-entry\n{PROMPT}")
    run("%djinn_run_to layers.2.attention.heads")
    stop = shell.user_ns["stop"]

    preview = run("%djinn_preview zero=True heads=1 tokens=-1 top_k=3")
    attention = run("%djinn_attention --head 1:3 --tokens -1")
    parts = run("%djinn_attribution ' Mary' --against 7")
    run("%djinn_in")

    assert (len(preview.after), preview.elements_changed) == (3, 8)
    assert (attention.layer, attention.heads, len(attention.positions)) == (2, [1, 2], 1)
    assert parts.text == " Mary"
    assert shell.user_ns["stop"].location == "layers.2.attention.output"
    assert stop.session.edits == []


def test_figures_are_shown_as_pictures(run, shell):
    run(f"%%djinn_run --stop-on-entry\n{PROMPT}")

    data, _ = shell.display_formatter.format(run("stop.attention(0).plot()"))

    assert data["image/png"]


def test_help_names_every_magic_with_a_line_of_its_own(run, magics, capsys):
    run("%djinn_help")
    lines = capsys.readouterr().out.strip().splitlines()

    names = {name for table in magics.magics.values() for name in table}
    assert {line.split()[0].lstrip("%") for line in lines} == names
    assert len({line.split(None, 1)[1] for line in lines}) == len(lines)
    for name in names:
        run(f"%djinn_help {name}")
        assert len(capsys.readouterr().out) > 20
    with pytest.raises(errors.BadArgument):
        run("%djinn_help nonsense")


def test_tab_completes_locations_ids_names_and_flags(run, magics):
    words = Completer(magics).words
    run("%djinn_break 1")
    run("%%djinn_run --max-new-tokens 2 --name here\nMary")
    run("%djinn_edit scale=2")

    assert words("%djinn_break layers.5", "layers.5") == [
        f"layers.5.{site}" for site in ("input", *INNER_SITES, "output")
    ]
    assert words("%djinn_preview top", "top") == ["top_k="]
    assert words("%djinn_break 3 --w", "--w") == ["--when"]
    assert words("%djinn_break 3 --when p", "p") == ["prefill"]
    assert "1" in words("%djinn_breaks remove ", "")
    assert "1" in words("%djinn_edits remove ", "")
    assert words("%djinn_attach h", "h") == ["here"]
    assert words("%djinn_edit sc", "sc") == ["scale="]
    assert words("%%djinn_run --max", "--max") == ["--max-new-tokens"]
    assert words("%djinn_help und", "und") == ["undo"]
    assert words("print(1)", "") == []


def test_completion_in_a_shell_offers_our_words_and_no_keywords(run, shell, magics):
    def completed(line: str) -> list[str]:
        with provisionalcompleter():
            return [found.text for found in shell.Completer.completions(line, len(line))]

    assert completed("%djinn_break 3 --when ") == ["any", "prefill", "decode"]
    assert completed("%djinn_break 3 --w") == ["--when"]
    assert completed("x = 1; pri")  # the rest is IPython's as before
    assert "%djinn_breaks" in completed("%djinn_br")


def test_unloading_takes_everything_back(shell, process):
    load_ipython_extension(shell)
    shell.run_line_magic("djinn_connect", process.address)
    server = shell.user_ns["server"]

    unload_ipython_extension(shell)

    assert server.closed
    assert shell.Completer.custom_matchers == []
    assert not any(name.startswith("djinn") for name in shell.magics_manager.magics["line"])
    assert not hasattr(errors.DjinnError("x"), "_render_traceback_")
