"""Copies of pages between tiers: begun here, and told of when they are made.

Which pages are copied, and when, is decided by `leaving` and `paging`; the bytes are the engine's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kernel_server.protocol.messages import ErrorInfo
from kernel_server.state.core import Core
from kernel_server.state.events import CopiesDone
from kernel_server.state.instructions import CopyPages
from kernel_server.state.residency import Moves, Row, Tier
from kernel_server.state.sessions import Session

#: Pages in one copy: the first of them can be used before the last has come.
RUN = 16
#: Pages in one copy that is made beforehand beside decodes: each takes the host's time besides.
LONG_RUN = 64
#: Pages in one copy that was asked for, while nobody computes on them: one event tells of all of
#: them in any case.
WHOLE_RUN = 256
#: Of copies that nobody is told of: they were made before anyone needed room.
WRITE_BEHIND = "write-behind"


@dataclass(slots=True)
class Swap:
    """Copies that were begun together, of which one event tells when the last is made."""

    left: int
    pages: int = 0
    nbytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Copying:
    """One copy under way."""

    moves: Moves
    #: whose pages they are; None where nobody is told
    session_id: str | None
    reason: str
    swap: Swap

    def what(self, count: int) -> str:
        """In words: so many pages, from where to where."""
        pages = "1 page" if count == 1 else f"{count} pages"
        return f"{pages} {self.moves.source} to {self.moves.target}"


class Copies(Core):
    """Begins copies and tells of them."""

    def _copy(
        self,
        session: Session | None,
        pages: Sequence[int],
        source: Tier,
        target: Tier,
        reason: str,
        *,
        run: int | None = None,
        more: int = 0,
    ) -> None:
        """Begin copies of `run` pages each, or of `RUN`: few where somebody waits for the first.

        The pages are copied in this order, and lie as is best for the next time. more: pages of the
        session that are to follow later.
        """
        if not pages:
            return
        rows = self._as_to_lie(session, pages, source, target)
        begun = self.residency.begin_all(pages, source, target, rows=rows, more=more)
        parts = begun.cut(run or RUN)
        swap = Swap(left=len(parts))
        owner = None if session is None or reason == WRITE_BEHIND else session.id
        for moves in parts:
            self._tickets_made += 1
            ticket = self._tickets_made
            self.copying[ticket] = Copying(moves, owner, reason, swap)
            if target == "device":
                self.inbound.update(dict.fromkeys(moves.pages, ticket))
            self.emit(
                CopyPages(
                    ticket=ticket,
                    way=moves.way,
                    sources=moves.source_slots,
                    targets=moves.target_slots,
                )
            )

    def _as_to_lie(
        self, session: Session | None, pages: Sequence[int], source: Tier, target: Tier
    ) -> list[Row] | None:
        """How the pages are to lie where they go: on the device as they lie below, so that they
        come in few copies; below in the order of the session's tables, in which they will be
        needed, each behind the page before it if that can be."""
        if target == "device":
            slots = self.residency.slots_in(source, pages)
            return [(None, [page for _, page in sorted(zip(slots, pages, strict=True))])]
        if session is None or source != "device":
            return None
        rows: list[tuple[int | None, list[int]]] = []
        going, before, last = set(pages), None, None
        for page in itertools.chain.from_iterable(session.tables):
            if page in going:
                if last is None or before != last:
                    rows.append((before, []))
                rows[-1][1].append(page)
                last = page
            before = page
        return [*rows]

    def _drop_all(self, pages: Iterable[tuple[int, Session]], reason: str) -> None:
        """Let pages leave the device that have a good copy below, and tell whose they were."""
        for session, run in by_session(pages):
            self._drop(session, run, reason)
            if (settling := self.settling.get(session.id)) is not None:
                settling.left_for = reason

    def _drop(self, session: Session, pages: list[int], reason: str) -> None:
        """The same for pages of one session."""
        if not pages:
            return
        self.leave_device(pages)
        self.note(session, "left the device", (reason, len(pages)))
        what = "1 page" if len(pages) == 1 else f"{len(pages)} pages"
        self.publish(session, "swapped", text=f"{what} left the device, copied before: {reason}")

    def _tell(self, copying: Copying, event: CopiesDone) -> None:
        """Tell of copies that were begun together once all are made: an event each, with all that
        is known of the session, took more of the host's time than the copies take of the bus."""
        swap = copying.swap
        swap.left -= 1
        if event.error is None:
            swap.pages += len(copying.moves)
            swap.nbytes += event.nbytes
            swap.seconds += event.seconds
        session = self.sessions.get(copying.session_id or "")
        if session is None or session.scratch:
            return
        if event.error is not None:
            self.publish(session, "swapped", text=self.failure_text(copying, event.error))
        if swap.left or not swap.pages:
            return
        self.note(session, "swapped", (copying.reason, event.ticket, swap.nbytes))
        rate = swap.nbytes / swap.seconds / 1e9 if swap.seconds > 0 else 0.0
        self.publish(
            session,
            "swapped",
            done=swap.nbytes,
            text=f"{copying.what(swap.pages)}, {rate:.1f} GB/s: {copying.reason}",
        )

    def failure_text(self, copying: Copying, error: ErrorInfo) -> str:
        """What is told of a copy that was not made."""
        return f"{copying.what(len(copying.moves))} failed ({error.message}): {copying.reason}"


def by_session(pages: Iterable[tuple[int, Session]]) -> list[tuple[Session, list[int]]]:
    """Pages that lie next to each other in the order and are of the same session."""
    groups = itertools.groupby(pages, key=lambda item: item[1].id)
    found = []
    for _, group in groups:
        items = list(group)
        found.append((items[0][1], [page for page, _ in items]))
    return found
