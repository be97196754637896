"""A real notebook kernel: Ctrl-C in a waiting cell, mistakes in magics, a killed kernel."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
from jupyter_client.manager import KernelManager

from tests.djinn_nb.conftest import LONG
from tests.system.conftest import PROMPT, World

pytestmark = pytest.mark.notebook

#: Tells that the cell that began it waits for a session that runs; an interrupt's message says how
#: the session is, however late the server tells it.
TELL = """
import threading, time
import djinn_nb.waiting
djinn_nb.waiting.ASK_S = 60

def tell():
    mirror = session.client.mirror
    while not (mirror.is_waited_for(session.id) and session.newest.status == 'running'):
        time.sleep(0.01)
    print('it is waited for', flush=True)
"""


class Notebook:
    """A kernel and what its cells printed or raised."""

    def __init__(self) -> None:
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel()
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=200)

    def begin(self, code: str) -> str:
        return self.client.execute(code)

    def finish(self, message_id: str, timeout_s: float = 200.0) -> str:
        """All text of a cell: streams, results and errors, colours taken off."""
        parts = []
        while True:
            message = self.client.get_iopub_msg(timeout=timeout_s)
            if message["parent_header"].get("msg_id") != message_id:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                parts.append(content["text"])
            elif kind in ("execute_result", "display_data"):
                parts.append(content["data"].get("text/plain", ""))
            elif kind == "error":
                parts.append("\n".join(content["traceback"]))
            elif kind == "status" and content["execution_state"] == "idle":
                return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(parts)).strip()

    def hear(self, message_id: str, text: str, timeout_s: float = 200.0) -> None:
        """Wait until a cell that runs has printed a text."""
        while True:
            message = self.client.get_iopub_msg(timeout=timeout_s)
            if message["parent_header"].get("msg_id") == message_id:
                assert message["msg_type"] != "error", message["content"]
                if text in message["content"].get("text", ""):
                    return

    def run(self, code: str) -> str:
        return self.finish(self.begin(code))

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def notebook(world: World) -> Iterator[Notebook]:
    made = Notebook()
    try:
        made.run(f"%load_ext djinn_nb\n%djinn_connect {world.process.address}")
        yield made
    finally:
        made.close()


def test_interrupts_in_a_waiting_cell_say_what_runs_and_lose_nothing(world, canary, notebook):
    notebook.run(f"session = server.launch({PROMPT!r}, max_new_tokens={LONG})\n{TELL}")
    said = []
    for index in range(15):
        waiting = "session.wait()" if index else "%djinn_continue"
        cell = notebook.begin(f"threading.Thread(target=tell, daemon=True).start()\n{waiting}")
        notebook.hear(cell, "it is waited for")
        time.sleep(0.02 * index)
        notebook.manager.interrupt_kernel()
        said.append(notebook.finish(cell))

    assert all("\n" not in text for text in said), said
    assert all("still runs on the server" in text for text in said), said
    assert all("session.wait()" in text and "session.pause()" in text for text in said)
    assert "pause" in notebook.run("%djinn_pause\nprint(stop.reason)")
    assert "(step)" in notebook.run("print(session.next())")
    session_id = notebook.run("print(session.id)")
    reference = world.launch(PROMPT, max_new_tokens=LONG)
    tokens = world.server.attach(session_id).tokens
    reference.break_at("logits", when="decode", ignore=len(tokens))
    reference.continue_()
    assert reference.tokens[: len(tokens)] == tokens


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("%djinn_break 99", "UnknownLocation"),
        ("%djinn_break blocks.3.attn.hook_q", "NotSupported"),
        ("%djinn_break 1 --if __import__('os')", "BadCondition"),
        ("%djinn_break 1 --if 'norm >'", "BadCondition"),
        ("%djinn_break 1 --ignore -1", "UsageError|BadArgument"),
        ("%djinn_break 1 --ignore x", "UsageError"),
        ("%djinn_break 1 --when sometimes", "UsageError"),
        ("%djinn_break", "UsageError"),
        ("%djinn_break 1 --speed", "UsageError"),
        ("%djinn_edit scale=nan", "BadArgument|BadEdit"),
        ("%djinn_edit scale=2 zero=True", "BadEdit"),
        ("%djinn_edit scale=2 tokens=999", "BadSelector"),
        ("%djinn_edit scale=2 tokens=[]", "BadSelector"),
        ("%djinn_edit scale=2 sticky=no", "BadArgument"),
        ("%djinn_edit speed=2", "BadArgument"),
        ("%djinn_edit scale", "BadArgument"),
        ("%djinn_edit scale=2 tokens='", "BadArgument"),
        ("%djinn_edit add=[1,2]", "BadEdit"),
        ("%djinn_edit scale=2 location=0", "BadEdit"),
        ("%djinn_lens --top-k 0", "BadArgument"),
        ("%djinn_lens --layers [99]", "UnknownLocation"),
        ("%djinn_lens --layers some", "BadArgument"),
        ("%djinn_run_to 99", "UnknownLocation"),
        ("%djinn_continue --timeout nan", "BadArgument"),
        ("%djinn_attach nobody", "UnknownSession"),
        ("%djinn_fork --seed -1", "UsageError|BadArgument"),
        ("%djinn_undo", "UndoRefused"),
        ("%djinn_breaks remove 99", "UnknownBreakpoint"),
        ("%djinn_edits remove 99", "UnknownEdit"),
        ("%djinn_connect 127.0.0.1:1", "NoServer"),
        ("%djinn_connect --option speed=1", "BadArgument"),
        ("%djinn_connect --token wrong-wrong-wrong-wrong {address}", "AccessDenied"),
        ("%djinn_load /no/such/folder --dtype int4", "BadArgument"),
        ("%%djinn_run --max-new-tokens 0\nMary", "BadArgument"),
        ("%%djinn_run --max-new-tokens x\nMary", "UsageError"),
        ("%%djinn_run --temperature nan\nMary", "BadArgument"),
        ("%%djinn_run --top-p 0\nMary", "BadArgument"),
        ("%%djinn_run --name ''\nMary", "BadArgument"),
        ("stop.attention(layer=99)", "UnknownLocation|BadArgument"),
        ("session.continue_(timeout=-1)", "BadArgument"),
    ],
)
def test_mistakes_in_magics_are_one_line_and_change_nothing(world, notebook, line, code):
    if "s0" not in notebook.run("print('s0' if 's0' in globals() else '')"):
        notebook.run(
            f"session = s0 = server.launch({PROMPT!r}, max_new_tokens=4)\nstop = session.run_to(2)"
        )
    before = world.infos()
    text = notebook.run(line.format(address=world.process.address))

    assert re.match(f"({code}): ", text), text
    pointed = code == "BadCondition"
    assert pointed or "\n" not in text, text
    assert world.infos() == before


def test_a_killed_kernel_leaves_its_session_to_the_next_one(world, canary, notebook):
    made = Notebook()
    try:
        made.run(f"%load_ext djinn_nb\n%djinn_connect {world.process.address}")
        made.run(f"s = server.launch({PROMPT!r}, max_new_tokens=40, name='left', temperature=1)")
        made.run("s.run_to(3)")
        expected = world.server.attach("left").fork().continue_().tokens
        made.manager.shutdown_kernel(now=True)
    finally:
        made.close()

    text = notebook.run(
        "left = server.attach('left')\nprint(left.stop.location)\nprint(left.continue_().tokens)"
    )
    assert [line for line in text.split("\n") if line] == ["layers.3.output", str(expected)]
