"""Sessions that stand still by the hundred, made in seconds and none the less each by itself.

A few are launched and stopped in their first decode, the others are forked from these; then every
one runs on by a whole forward, to the same layer of the next. With prompts shorter than a page it
has then written the one page it has in each group, which is a page of its own from there on.
"""

from __future__ import annotations

from collections.abc import Sequence

from djinn_nb import Session, Stopped
from notebooks.harness.company import start
from notebooks.harness.exactness import Prompt
from notebooks.harness.inprocess import Local


class Standing:
    """So many sessions that stand still behind a layer, as many as one wants at a time.

    Each runs one of the prompts, in turn. sessions: those that stand, and the number of each one's
    prompt. forked: how many were forks, of all so far; shared_before: pages that these had together
    with others before they ran on, counted once for each but the first that has one.

        standing = Standing(local, prompts, layer=20)
        standing.become(256)
    """

    def __init__(self, local: Local, prompts: Sequence[Prompt], layer: int) -> None:
        self._local = local
        self._prompts = prompts
        self._layer = layer
        self.sessions: list[tuple[Session, int]] = []
        self.forked = 0
        self.shared_before = 0

    def become(self, count: int) -> None:
        """End those that stand last, or have others stand still, until there are so many."""
        while len(self.sessions) > count:
            self.sessions.pop()[0].terminate()
        if len(self.sessions) < count:
            self._add(count - len(self.sessions))

    def shared_pages(self) -> int:
        """Pages that more than one of them has, counted once for each but the first."""
        return self._shared([session for session, _ in self.sessions])

    def _add(self, count: int) -> None:
        kinds = [number % len(self._prompts) for number in range(count)]
        parents = [self._stopped(self._prompts[kind]) for kind in kinds[: len(self._prompts)]]
        forks = [parents[kind].fork() for kind in kinds[len(parents) :]]
        made = [*parents, *forks]
        self.forked += len(forks)
        self.shared_before += self._shared(made)
        # all at once: the engine has the next one while a client is told of the one before
        for session in made:
            start(session)
        for session in made:
            _require_stop(session.wait(), 2)
        self.sessions += zip(made, kinds, strict=True)

    def _stopped(self, prompt: Prompt) -> Session:
        session = prompt.launch(self._local)
        session.break_at(self._layer, ignore=1)  # a fork has it too, and meets it one forward later
        stop = session.continue_()
        _require_stop(stop, 1)
        return session

    def _shared(self, sessions: Sequence[Session]) -> int:
        inside = self._local.kernel.state.sessions
        with self._local.kernel.loop._lock:
            pages = [p for one in sessions for table in inside[one.id].tables for p in table]
        return len(pages) - len(set(pages))


def _require_stop(stop: object, forward: int) -> None:
    assert isinstance(stop, Stopped) and stop.reason == "breakpoint", stop
    assert stop.forward == forward, stop
