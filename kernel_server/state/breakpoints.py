"""The breakpoints of a session: where they are, when they count, and when they stop.

A breakpoint is *hit* when one of its locations is reached in a matching forward while it is
enabled, *holds* when its condition holds for at least one token there (without a condition:
always), and *stops* the session once it has held more often than its ignore count. A data
breakpoint has many locations, a logpoint notes what it finds and never stops. Stops of other kinds
are decided in `stepping`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, get_args

from kernel_server.protocol.conditions import Condition
from kernel_server.protocol.errors import BadArgument, UnknownBreakpoint
from kernel_server.protocol.location import Point, location_at
from kernel_server.protocol.messages import BreakpointInfo, BreakpointKind, SetBreakpoint, When
from kernel_server.state.condition_rules import make_condition
from kernel_server.state.events import LogResult
from kernel_server.state.instructions import Check, LogPlan, Lookup
from kernel_server.state.logpoints import Log, make_log
from kernel_server.state.selectors import TokenSelector
from kernel_server.state.shape import ModelShape

#: Most locations of one breakpoint.
MAX_LOCATIONS = 4096


@dataclass(slots=True, kw_only=True)
class Breakpoint:
    """One breakpoint with its counts."""

    id: int
    kind: BreakpointKind
    points: tuple[Point, ...]
    locations: tuple[str, ...]
    when: When
    condition: Condition | None
    lookup: Lookup | None
    #: the tokens it is about, None for all
    tokens: TokenSelector | None
    ignore: int
    once: bool
    #: of a logpoint
    log: Log | None
    enabled: bool = True
    hits: int = 0
    held: int = 0
    stops: int = 0
    #: forward and point where it last read the lens, of one that compares with what it read before
    read_at: tuple[int, Point] | None = None
    #: questions that are the same in every forward, by point: making 24 costs a decode 0.7 %
    _asked: dict[Point, Check] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sure(self) -> bool:
        """It stops whenever it is reached, whatever the values are."""
        return self.condition is None and self.log is None and self.held >= self.ignore

    @property
    def compares(self) -> bool:
        """It compares what the lens reads with what it read at its location before."""
        return self.condition is not None and "top_token_changed" in self.condition.names

    def check(self, point: Point, hits: int, rows: tuple[int, ...] | None = None) -> Check:
        """The question put to the engine."""
        assert self.condition is not None
        same = rows is None and len(self.points) > 1 and "hits" not in self.condition.names
        if same and (known := self._asked.get(point)) is not None:
            return known
        made = Check(
            breakpoint_id=self.id,
            point=point,
            names=self.condition.names,
            holds=self.condition.holds,
            hits=hits,
            rows=rows,
            lookup=self.lookup,
        )
        if same:
            self._asked[point] = made
        return made

    def count(self, holds: bool) -> bool:
        """Note that it was reached; True when it stops the session."""
        self.hits += 1
        if not holds:
            return False
        self.held += 1
        if self.held <= self.ignore:
            return False
        self.stops += 1
        if self.once:
            self.enabled = False
        return True

    def copy(self) -> Breakpoint:
        """The same with its counts, for a fork; a log starts anew."""
        return replace(self, log=None if self.log is None else self.log.empty())

    def info(self) -> BreakpointInfo:
        log = self.log
        shown = BreakpointInfo(
            id=self.id,
            location=self.locations[0],
            locations=self.locations,
            kind=self.kind,
            when=self.when,
            condition=None if self.condition is None else self.condition.text,
            ignore=self.ignore,
            once=self.once,
            enabled=self.enabled,
            hits=self.hits,
            held=self.held,
            stops=self.stops,
        )
        if log is None:
            return shown
        return replace(
            shown,
            what=log.what,
            records=len(log.sizes),
            dropped=log.dropped,
            log_bytes=log.nbytes,
            max_bytes=log.max_bytes,
        )


class Place(NamedTuple):
    """A breakpoint at one of its points."""

    point: Point
    breakpoint: Breakpoint


class Breakpoints:
    """The breakpoints of one session, by id."""

    def __init__(self) -> None:
        self._all: dict[int, Breakpoint] = {}
        self.next_id = 1
        #: prefill? -> enabled breakpoints of that phase, in the order of their points
        self._armed: dict[bool, tuple[Place, ...]] = {}

    @classmethod
    def of(cls, found: Iterable[Breakpoint]) -> Breakpoints:
        """These breakpoints, with their ids."""
        made = cls()
        made._all = {one.id: one for one in found}
        made.next_id = max(made._all, default=0) + 1
        return made

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Breakpoint]:
        return iter(self._all.values())

    def get(self, breakpoint_id: int) -> Breakpoint:
        """The breakpoint with this id, or `UnknownBreakpoint`."""
        found = self._all.get(breakpoint_id)
        if found is None:
            have = ", ".join(map(str, self._all)) or "none"
            raise UnknownBreakpoint(f"no breakpoint {breakpoint_id}: the session has {have}")
        return found

    def add(self, request: SetBreakpoint, shape: ModelShape, num_prompt_tokens: int) -> Breakpoint:
        """Add the breakpoint asked for, or refuse it and change nothing."""
        points = _points(request, shape)
        condition, lookup = make_condition(request, points, shape)
        tokens = None
        if request.tokens.kind != "all":
            tokens = TokenSelector(request.tokens, num_prompt_tokens)
        if request.kind == "data breakpoint" and condition is None:
            raise BadArgument("a data breakpoint watches a value: give it a condition")
        if request.kind == "breakpoint" and tokens is not None:
            raise BadArgument("a breakpoint is about all tokens: choose them in its condition")
        made = Breakpoint(
            id=self.next_id,
            kind=request.kind,
            points=points,
            locations=tuple(str(location_at(point, shape.num_layers)) for point in points),
            when=_known_phase(request.when),
            condition=condition,
            lookup=lookup,
            tokens=tokens,
            ignore=_count(request.ignore),
            once=request.once,
            log=make_log(request),
        )
        self.next_id += 1
        self._all[made.id] = made
        self._armed.clear()
        return made

    def remove(self, found: Breakpoint) -> None:
        del self._all[found.id]
        self._armed.clear()

    def enable(self, found: Breakpoint, enabled: bool) -> None:
        found.enabled = enabled
        self._armed.clear()

    def armed(self, prefill: bool) -> tuple[Place, ...]:
        """Enabled breakpoints of this phase, in the order of their points, then of their ids."""
        made = self._armed.get(prefill)
        if made is None:
            skipped = "decode" if prefill else "prefill"
            places = (
                Place(point, b)
                for b in self._all.values()
                if b.enabled and b.when != skipped
                for point in b.points
            )
            made = tuple(sorted(places, key=lambda place: (place.point, place.breakpoint.id)))
            self._armed[prefill] = made
        return made

    def reached(
        self,
        armed: Iterable[Place],
        forward: int,
        points: tuple[Point, Point],
        held: Mapping[int, tuple[int, ...]],
    ) -> list[Breakpoint]:
        """Count what was passed or reached; returns the breakpoints that stop at the last point.

        armed: those the engine was told of. points: where it stood before, and stands now.
        held: breakpoint id -> positions at which its condition held, at the last point.
        """
        stopping = []
        for point, found in armed:
            if not points[0] < point <= points[1]:
                continue
            if found.compares:
                found.read_at = forward, point
            if not found.enabled or self._all.get(found.id) is not found:
                continue  # disabled or removed while the engine was on its way
            if found.log is not None:
                found.hits += 1
                continue
            holds = point == points[1] and found.id in held
            if found.count(found.condition is None or holds):
                # a sure one would have ended the stretch, so nothing that stops was passed
                assert point == points[1], f"breakpoint {found.id} was run past"
                stopping.append(found)
        if any(not found.enabled for found in stopping):
            self._armed.clear()
        return stopping

    def come_back(self, forward: int, point: Point) -> tuple[tuple[int, Point], ...]:
        """Where those that compare are to have read the lens last, by id, when a forward is run
        up to `point` again; from there on it counts as read."""
        last: dict[int, tuple[Breakpoint, Point]] = {}
        for place, found in self.armed(forward == 0):
            if found.compares and place <= point:
                last[found.id] = found, place
        for found, place in last.values():
            found.read_at = forward, place
        return tuple((breakpoint_id, place) for breakpoint_id, (_, place) in last.items())

    def reads(self, forward: int, point: Point) -> tuple[tuple[int, Point], ...]:
        """Where those that compare have read the lens last, by id, of a session that stands
        there."""
        found = []
        for one in self._all.values():
            read = one.read_at
            if read is None or read[0] != forward:
                continue
            before = [place for place in one.points if place <= min(read[1], point)]
            found += [(one.id, before[-1])] if before else []
        return tuple(found)

    def noted(self, results: Iterable[LogResult]) -> tuple[list[int], list[LogResult]]:
        """Count what logpoints have noted; returns the ids of those that are gone, and the results
        of those that ended the stretch for want of room."""
        gone, full = [], []
        for result in results:
            found = self._all.get(result.breakpoint_id)
            if found is None or found.log is None:
                gone.append(result.breakpoint_id)
                continue
            found.log.take(result)
            # not more than was counted: it may have been disabled on the way
            found.held = min(found.held + result.held, found.hits)
            if result.refused_bytes is not None:
                full.append(result)
        return gone, full

    def log_bytes(self) -> int:
        """Bytes of the records of all its logpoints; may be asked from another thread."""
        return sum(b.log.nbytes for b in list(self._all.values()) if b.log is not None)

    def num_dropped(self) -> int:
        """Records its logpoints have lost."""
        return sum(found.log.dropped for found in self._all.values() if found.log is not None)

    def empty_logs(self) -> None:
        """The records are gone with the session's tensors."""
        for found in self._all.values():
            if found.log is not None:
                found.log = found.log.empty()

    def copy(self) -> Breakpoints:
        """The same breakpoints with their counts, for a fork; its logs are empty."""
        made = Breakpoints()
        made._all = {key: found.copy() for key, found in self._all.items()}
        made.next_id = self.next_id
        return made

    def info(self) -> tuple[BreakpointInfo, ...]:
        return tuple(found.info() for found in self._all.values())

    def check(self) -> None:
        """Assert that counts fit each other and the cache is fresh."""
        for found in self._all.values():
            assert 0 <= found.stops <= found.held <= found.hits, f"counts of {found}"
            assert found.id < self.next_id
            if found.log is not None:
                found.log.check()
        for prefill, armed in self._armed.items():
            skipped = "decode" if prefill else "prefill"
            fresh = {b.id for b in self._all.values() if b.enabled and b.when != skipped}
            assert {place.breakpoint.id for place in armed} == fresh, "armed ones are stale"


def questions(
    armed: Iterable[Place], tokens: Sequence[int], first: int, end: int
) -> tuple[tuple[Check, ...], tuple[LogPlan, ...]]:
    """What the engine is to judge and to note on its way. Breakpoints without a condition are
    counted when they are passed.

    armed: in order. tokens: ids of the session's first `end` tokens, or more; those from `first` on
    are fed in this forward.
    """
    checks: list[Check] = []
    logs: list[LogPlan] = []
    passed: dict[int, int] = {}
    for point, found in armed:
        log = found.log
        if found.condition is None and log is None:
            continue
        hits = found.hits
        if len(found.points) > 1:
            hits += passed.get(found.id, 0)
            passed[found.id] = passed.get(found.id, 0) + 1
        rows = None
        if found.tokens is not None:
            chosen = found.tokens.positions(tokens, first, end)
            if not chosen:
                continue
            rows = tuple(position - first for position in chosen)
        check = None if found.condition is None else found.check(point, hits, rows)
        if log is None:
            assert check is not None
            checks.append(check)
            continue
        logs.append(
            LogPlan(
                breakpoint_id=found.id,
                point=point,
                check=check,
                rows=rows,
                what=log.what,
                room_bytes=log.room,
                stop_when_full=log.stop_when_full,
            )
        )
    return tuple(checks), tuple(logs)


def _points(request: SetBreakpoint, shape: ModelShape) -> tuple[Point, ...]:
    """Its points in the order they are reached, each once."""
    count = len(request.locations)
    if request.kind == "breakpoint" and count != 1:
        raise BadArgument(f"a breakpoint has one location, not {count}: set one for each")
    if not 1 <= count <= MAX_LOCATIONS:
        raise BadArgument(f"{count} locations: give 1 to {MAX_LOCATIONS}")
    return tuple(sorted({shape.point(location) for location in request.locations}))


def _known_phase(when: When) -> When:
    if when not in get_args(When):
        raise BadArgument(f"when is {when!r}: choose 'any', 'prefill' or 'decode'")
    return when


def _count(ignore: int) -> int:
    if isinstance(ignore, bool) or not isinstance(ignore, int) or ignore < 0:
        raise BadArgument(f"ignore is {ignore!r}: give how many times to pass, 0 or more")
    return ignore
