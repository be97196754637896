"""Somebody else at the same kernel: a client in a process of its own, with a session that it swaps.

    python -m notebooks.harness.other_client ADDRESS    (its access token is in $DJINN_TOKEN)

What it asks for takes the server's time, as any client's does, but not that of the interpreter the
kernel runs in. It is another owner: nobody here is told of its session.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import select
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import djinn_nb
from djinn_nb import Session, Stopped
from kernel_server.pacing import BURST_S, Pacer
from kernel_server.service import Service
from kernel_server.wire import Address
from notebooks.harness.child import Child, answer, child
from notebooks.harness.exactness import Prompt
from notebooks.harness.inprocess import Local

OWNER = "somebody else"
#: Of what may be had at once, a part that counts as nothing.
_LEFT = 0.1
#: How long that may take, seconds.
_UNTIL_S = 60.0


class OtherClient:
    """The client, and its session, stopped inside its first decode.

    session_id: of that session.
    """

    def __init__(self, pacer: Pacer, process: Child, session_id: str) -> None:
        self._pacer = pacer
        self._process = process
        self.session_id = session_id

    def swap_until_held(self) -> None:
        """Swap until nothing may be had at once any more: a run that begins now is slowed down as
        by one who swaps all along, however short it is."""
        end = time.monotonic() + _UNTIL_S
        with self.swapping():
            while self._pacer.left_s(OWNER) > _LEFT * BURST_S:
                assert time.monotonic() < end, "who swaps hardly uses the server"
                time.sleep(0.001)

    @contextlib.contextmanager
    def swapping(self) -> Iterator[list[int]]:
        """Have the session's pages leave the device and come back, again and again, at least once;
        yields a list that holds how often, at the end.

        As at any server, whoever swaps is held while a session of another's runs.
        """
        done = [0]
        self._process.send(swap=True)
        assert self._process.read() == {"begun": True}
        try:
            yield done
        finally:
            self._process.send(swap=False)
            done[0] = int(self._process.read()["swaps"])

    def finish(self) -> tuple[int, ...]:
        """Run the session to its end; the tokens it drew."""
        self._process.send(finish=True)
        return tuple(self._process.read()["tokens"])


@contextlib.contextmanager
def other_client(local: Local, prompt: Prompt, layer: int) -> Iterator[OtherClient]:
    """Serve the kernel at a socket to one more client, whose session stands behind this layer."""
    token = secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory(prefix="djinn-") as folder:
        address = Address(path=f"{folder}/socket")
        gateway = local.kernel.gateway
        service = Service(gateway.handle, {OWNER: token}, address, pacer=gateway.pacer).start()
        try:
            module = "notebooks.harness.other_client"
            with child(module, str(service.address), DJINN_TOKEN=token) as process:
                process.send(ids=list(prompt.ids), new_tokens=prompt.new_tokens, layer=layer)
                yield OtherClient(gateway.pacer, process, str(process.read()["session"]))
                process.send(end=True)
                process.read()
        finally:
            # its last poll for events has nobody to answer, and ends by itself
            service.close(timeout_s=0.2)


def main() -> None:
    """Launch and stop a session, then do as the lines say until the session is to end."""
    server = djinn_nb.connect(sys.argv[1])
    answer(ready=True)
    session: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "ids" in asked:
            session = _stopped(server, asked)
            answer(session=session.id)
        elif "swap" in asked:
            answer(begun=True)
            answer(swaps=_swap(session))
        elif "finish" in asked:
            session.continue_()
            answer(tokens=list(session.tokens[session.newest.num_prompt_tokens :]))
        elif "end" in asked:
            session.terminate()
            server.close()
            answer(ended=True)
            return


def _stopped(server: djinn_nb.Server, asked: dict[str, Any]) -> Session:
    session = server.launch(asked["ids"], max_new_tokens=asked["new_tokens"])
    session.break_at(asked["layer"], ignore=1, once=True)
    stop = session.continue_()
    assert isinstance(stop, Stopped) and stop.forward == 1, stop
    return session


def _swap(session: Session) -> int:
    """Swap until the next line comes, which says to end; how often."""
    count = 0
    while not count or not select.select([sys.stdin], [], [], 0)[0]:
        session.evict(to="host")
        session.restore()
        count += 1
    sys.stdin.readline()
    return count


if __name__ == "__main__":
    main()
