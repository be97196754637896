"""Two nodes compared: which forwards of each are run again for it, and how far.

What both have in common needs no look: before the first forward whose tokens or edits differ lies
their *common past*. From there each is run again on a scratch fork, as it went the first time (the
same edits, the tokens that were drawn), to the last place that both have reached. What is computed
from the streams that the forks caught is the engine's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import (
    BadSelector,
    NotFinished,
    NotStopped,
    QuotaExceeded,
)
from kernel_server.protocol.location import NOT_STARTED, Point
from kernel_server.state.branches import NO_EDITS, Applied, Cursor, Node, Replay, cut
from kernel_server.state.branching import Branching
from kernel_server.state.events import Requested
from kernel_server.state.instructions import Captures, Compared, RestoreTensors
from kernel_server.state.selectors import TokenSelector
from kernel_server.state.sessions import Session
from kernel_server.state.stepping import Target

#: Figures of one place and token that travel, bytes; and most of all of them: less than a frame.
_CELL_BYTES, _FIGURES_BYTES = 24, 6 << 20


@dataclass(frozen=True, slots=True)
class _Arm:
    """One of the two: the line that holds the node, and what determines the run up to it."""

    session: Session
    line: Session
    node: Node
    tokens: tuple[int, ...]
    applied: Mapping[int, Applied]
    #: the last place whose residual stream is known: forward and a whole point
    last: Cursor

    @property
    def num_prompt(self) -> int:
        return len(self.session.prompt)

    @property
    def end_token(self) -> int:
        return self.num_prompt + self.last[0]

    def cut_to(self, end_token: int, num_layers: int) -> _Arm:
        """The same, no further than the forward that feeds the last of so many tokens."""
        forward = max(0, end_token - self.num_prompt)
        return self if forward == self.last[0] else replace(self, last=(forward, num_layers))

    def first_token(self, forward: int) -> int:
        return 0 if forward == 0 else self.num_prompt + forward - 1

    def determined_by(self, forward: int) -> object:
        """What a forward depends on besides those before it."""
        first, end = self.first_token(forward), self.num_prompt + forward
        made = [(e.point, e.spec, where) for e, where in self.applied.get(forward, ()) if where]
        return self.tokens[first:end], made


class Comparing(Branching):
    """Compares two nodes."""

    def read_diff(self, event: Requested, request: m.ReadDiff, session: Session) -> None:
        other = self.own(event.owner, request.other_id)
        arms = self._arm(session, request.node), self._arm(other, request.other_node)
        num_layers = self.shape.num_layers
        end = min(arm.end_token for arm in arms)
        one, two = (arm.cut_to(end, num_layers) for arm in arms)
        start = 0
        if one.session.prompt == two.session.prompt:
            last = min(one.last, two.last)
            one, two = replace(one, last=last), replace(two, last=last)
            forwards = range(last[0])
            unlike = (f for f in forwards if one.determined_by(f) != two.determined_by(f))
            start = next(unlike, last[0])
        first = one.first_token(start)
        positions = self._compared_positions(request, one, first, end)
        count = end - first if positions is None else len(positions)
        self._check_figures(count)
        forks = [self._arm_fork(arm, start, positions) for arm in (one, two)]
        pages = sum(self._pages_again(arm, start) for arm in (one, two))
        question = self._ask(event, session, num_layers, *forks, pages=pages)
        question.first_token, question.forward, question.rows = first, start, positions
        question.compared = Compared(
            end_token=end,
            token_ids=(arms[0].tokens, arms[1].tokens),
            num_prompt_tokens=(one.num_prompt, two.num_prompt),
        )
        for fork, arm in zip(forks, (one, two), strict=True):
            self.emit(
                RestoreTensors(session_id=fork.id, source_id=arm.line.id, node=None, forward=start)
            )
            fork.replay = Replay(
                node=None,
                after=arm.node.number,
                target=Target(*arm.last),
                applied=arm.applied,
                tokens=arm.tokens,
                known_until=None,
            )
            fork.target = fork.replay.target
            self.set_running(fork)

    def _arm(self, session: Session, number: int) -> _Arm:
        """A node at rest, or a refusal."""
        self._refuse_failed(session)
        if session.status == "running" or session.pending is not None:
            doing = "is running" if session.pending is None else "is being edited"
            raise NotStopped(
                f"session {session.id} {doing}, and what rests is compared: wait for it, or pause"
                " it",
                status=session.status,
            )
        tree = session.tree
        node = tree.here if number == session.stop_number else tree.get(number)
        line = self._host(session, node)
        self.require_built(line)
        forward, point = node.cursor
        if point == NOT_STARTED and forward == 0:
            raise NotFinished(
                f"node {number} of session {session.id} lies before the first layer: nothing is"
                " computed there yet, continue it first"
            )
        num_layers = self.shape.num_layers
        reached = min(math.floor(point), num_layers)
        return _Arm(
            session,
            line,
            node,
            tuple(line.tokens[: self._num_tokens(session, node.cursor)]),
            cut(line.applied, node.cursor),
            (forward, reached) if point != NOT_STARTED else (forward - 1, num_layers),
        )

    def _compared_positions(
        self, request: m.ReadDiff, arm: _Arm, first: int, end: int
    ) -> tuple[int, ...] | None:
        """Absolute positions that the selector means, None for all that are run again."""
        selector = TokenSelector(request.tokens, arm.num_prompt)
        selector.check_once(end, end)
        if selector.kind == "all":
            return None
        found = tuple(sorted(selector.positions(arm.tokens, first, end)))
        if not found:
            raise BadSelector(
                f"tokens {first} to {end - 1} are compared, and {selector} selects others: those"
                " before are of a common past"
            )
        return found

    def _check_figures(self, count: int) -> None:
        """Refuse more than may be held on the device, or travel."""
        places = self.shape.num_layers + 1
        held = 2 * 4 * self.shape.hidden_size * places * count
        sent = _CELL_BYTES * places * count
        for size, most, what in (
            (held, self.limits.captured_bytes, "held for it"),
            (sent, _FIGURES_BYTES, "of figures"),
        ):
            if size > most:
                raise QuotaExceeded(
                    f"to compare {count} tokens at {places} places about {size:,} bytes are {what},"
                    f" the limit is {most:,}: choose fewer tokens",
                    needed=size,
                    limit=most,
                )

    def _pages_again(self, arm: _Arm, start: int) -> int:
        """Pages at most that a fork writes from the start of a forward on."""
        shape = self.shape
        first = arm.first_token(start) // shape.page_tokens
        return (shape.pages_for(arm.end_token) - first) * shape.num_groups

    def _arm_fork(self, arm: _Arm, start: int, positions: tuple[int, ...] | None) -> Session:
        """A scratch fork of a line that stands before a forward, and catches the stream."""
        place: Point = NOT_STARTED
        fork = self._fork(arm.line, from_start=True)
        fork.tables = self._cut_tables(arm.session, arm.line.tables, (start, place))
        fork.tokens = list(arm.tokens[: arm.num_prompt + start])
        fork.forward, fork.edits = start, NO_EDITS.copy()
        # another sampler drew the tokens before: then they are taken as they are
        fork.tree.sampled_from = arm.session.tree.sampled_from
        fork.captures = Captures(
            points=tuple(range(self.shape.num_layers + 1)),
            what="stream",
            rows=positions,
            elements=None,
        )
        return fork
