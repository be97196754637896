"""Sessions that outlive their server: waiting until one is computed again, and who is who.

A server that goes on with the journal of an earlier one has its sessions, under the same ids. What
needs their tensors is refused until they are computed again; here the refusal becomes a wait, with
progress, and the request is repeated.
"""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING

from djinn_nb.progress import Progress
from kernel_server.protocol import messages as m

if TYPE_CHECKING:
    from djinn_nb.client import Client

#: Without news for this long the server is asked again, seconds.
GUARD_S = 5.0
#: The same for a hidden branch, of which only progress is told.
BRANCH_S = 0.5
#: How often a server that loads its model after a restart is asked, and how long, seconds.
LOADING_S, LOADED_WITHIN_S = 0.2, 600.0


def identity(initialized: m.Initialized) -> str:
    """What stays the same as long as the same sessions are there."""
    return initialized.journal or initialized.server_id


def wait_until_ready(client: Client, error: m.ErrorInfo) -> bool:
    """Wait for what a refusal says is under way; False: waiting would not help."""
    if error.code == "NotRebuilt":
        _wait_until_built(client, error)
        return True
    if error.code == "ModelLoading" and client.restarted:
        _wait_until_loaded(client)
        return True
    return False


def _wait_until_built(client: Client, error: m.ErrorInfo) -> None:
    """Return when the session has changed, or there has been no news for a while."""
    session_id = str(error.details.get("session_id", ""))
    total = int(error.details.get("forwards", 0))
    with (
        client.mirror.waiter(session_id) as waiter,
        Progress(f"computing session {session_id} again", unit="forward") as progress,
    ):
        # what happened before we listened is not waited for; a hidden branch is not told of
        patience_s = GUARD_S if client.is_dormant(session_id) else BRANCH_S
        while True:
            _, event = waiter.next(patience_s)
            if event is None or event.kind != "progress":
                return
            progress.at(event.done, max(event.total, total, 1), event.text)


def _wait_until_loaded(client: Client) -> None:
    deadline = time.monotonic() + LOADED_WITHIN_S
    with Progress("the server was restarted: loading its model", unit="%") as progress:
        while time.monotonic() < deadline:
            found = client.initialize()
            if found.phase != "loading":
                return
            progress.at(100 * found.fraction, 100, found.progress)
            time.sleep(LOADING_S)


class Durability:
    """Says once when sessions stop being durable, and once when they are again."""

    def __init__(self) -> None:
        self._text = self._said = ""

    def take(self, text: str) -> None:
        """Note what the server says; may come on any thread."""
        self._text = text

    def warn(self) -> None:
        """Tell the person, on their own thread."""
        text = self._text
        if text == self._said:
            return
        self._said = text
        warnings.warn(text or "sessions are durable again", stacklevel=4)
