"""Waiting until a session stops: by events, with progress, a deadline and a safe interrupt.

The server runs the session whether or not anyone waits. So an interrupt or a deadline ends the
waiting only, and says what still runs and how to wait on or pause.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from djinn_nb.checks import seconds
from djinn_nb.client import Client, Waiter
from djinn_nb.progress import Progress
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import DjinnError, StillRunning, UnknownSession

#: Without news for this long the server is asked, seconds; its events should have come sooner.
GUARD_S = 5.0
#: An interrupted caller is kept this long to be told how the session is, seconds.
ASK_S = 1.0
#: The answer to a request that makes a session run may wait so long for the rest, seconds: nobody
#: else of this client is kept by it for longer.
HELD_S = 0.05
#: Events after which a running session rests.
RESTING = ("stopped", "finished", "failed")


class Interrupted(KeyboardInterrupt):
    """The waiting was interrupted; the session runs on. Shown as one line in a notebook."""


def run_until_rest(
    client: Client, message: Any, *, timeout_s: float | None, name: str
) -> m.SessionInfo:
    """Send a request that makes a session run, and wait until it rests.

    Raises StillRunning after `timeout_s`, Interrupted on an interrupt, UnknownSession when the
    session was terminated meanwhile; the session is not touched by any of these.
    """
    deadline = time.monotonic() + seconds(timeout_s, "timeout")
    try:
        with client.mirror.waiter(message.session_id) as waiter:
            wait_s = max(0.0, min(HELD_S, deadline - time.monotonic()))
            info = client.control(replace(message, wait_s=wait_s))
            return _rest(client, waiter, info, deadline, timeout_s, name)
    except KeyboardInterrupt:
        raise _interrupted(client, message.session_id, name) from None


def wait_until_rest(
    client: Client, session_id: str, *, timeout_s: float | None, name: str
) -> m.SessionInfo:
    """Wait until a session that runs rests; one that rests already is described."""
    deadline = time.monotonic() + seconds(timeout_s, "timeout")
    try:
        with client.mirror.waiter(session_id) as waiter:
            info = client.describe(session_id)
            return _rest(client, waiter, info, deadline, timeout_s, name)
    except KeyboardInterrupt:
        raise _interrupted(client, session_id, name) from None


def _rest(
    client: Client,
    waiter: Waiter,
    info: m.SessionInfo,
    deadline: float,
    timeout_s: float | None,
    name: str,
) -> m.SessionInfo:
    first = info.event_seq
    with Progress(name, unit="token") as progress:
        while info.status == "running":
            left = deadline - time.monotonic()
            if left <= 0:
                raise StillRunning(
                    f"{name} is still running after {timeout_s:g} s{_how_far(client, info.id)}:"
                    " session.wait() waits on, session.pause() stops it"
                )
            came, event = waiter.next(min(left, GUARD_S))
            if event is None:
                # nothing came for long, or events may have been missed
                if not came and left <= GUARD_S:
                    continue
                info = client.describe(info.id)
            elif event.seq <= first:
                continue  # from before this run
            elif event.kind in RESTING and event.session is not None:
                return event.session
            elif event.kind == "terminated":
                raise UnknownSession(f"{name} was terminated while it ran; launch another")
            elif event.kind == "progress":
                progress.at(event.done, event.total, event.text)
    return info


def _how_far(client: Client, session_id: str) -> str:
    info = client.describe(session_id)
    generated = len(info.tokens) - info.num_prompt_tokens
    return f" (forward {info.forward}, {generated} of {info.max_new_tokens} tokens generated)"


def _interrupted(client: Client, session_id: str, name: str) -> Interrupted:
    """What the interrupt has left behind. The server is asked: what is known here may be from
    before the request, which was on its way."""
    try:
        message = m.Describe(session_id=session_id)
        status = client.call(message, m.SessionReply, timeout_s=ASK_S).session.status
    except (DjinnError, KeyboardInterrupt) as error:  # no answer, or an impatient second interrupt
        why = f" ({error})" if str(error) else ""
        return Interrupted(
            f"{name} may still run on the server{why}: session.status tells, session.wait() waits"
            " on, session.pause() stops it"
        )
    if status == "running":
        return Interrupted(
            f"{name} still runs on the server: session.wait() waits on, session.pause() stops it"
        )
    if status == "waiting":
        return Interrupted(f"{name} was not started: session.continue_() runs it")
    return Interrupted(f"{name} is {status}; session.wait() shows where it stands")
