"""The breakpoints of a session: where they are, when they count, and when they stop.

A breakpoint is *hit* when its location is reached in a matching forward while it is enabled,
*holds* when its condition holds for at least one token there (without a condition: always), and
*stops* the session once it has held more often than its ignore count. Stops of other kinds are
decided in `stepping`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import get_args

from kernel_server.protocol.conditions import Condition, parse_condition
from kernel_server.protocol.errors import BadArgument, UnknownBreakpoint
from kernel_server.protocol.location import Point, location_at
from kernel_server.protocol.messages import BreakpointInfo, SetBreakpoint, When
from kernel_server.state.instructions import Check
from kernel_server.state.shape import ModelShape


@dataclass(slots=True, kw_only=True)
class Breakpoint:
    """One breakpoint with its counts."""

    id: int
    point: Point
    when: When
    condition: Condition | None
    ignore: int
    once: bool
    enabled: bool = True
    hits: int = 0
    held: int = 0
    stops: int = 0

    @property
    def sure(self) -> bool:
        """It stops whenever it is reached, whatever the values are."""
        return self.condition is None and self.held >= self.ignore

    def check(self) -> Check:
        """The question put to the engine."""
        assert self.condition is not None
        return Check(
            breakpoint_id=self.id,
            point=self.point,
            names=self.condition.names,
            holds=self.condition.holds,
            hits=self.hits,
        )

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

    def info(self, num_layers: int) -> BreakpointInfo:
        return BreakpointInfo(
            id=self.id,
            location=str(location_at(self.point, num_layers)),
            locations=(str(location_at(self.point, num_layers)),),
            when=self.when,
            condition=None if self.condition is None else self.condition.text,
            ignore=self.ignore,
            once=self.once,
            enabled=self.enabled,
            hits=self.hits,
            held=self.held,
            stops=self.stops,
        )


class Breakpoints:
    """The breakpoints of one session, by id."""

    def __init__(self) -> None:
        self._all: dict[int, Breakpoint] = {}
        self._next_id = 1
        #: prefill? -> enabled breakpoints of that phase, in the order of their points
        self._armed: dict[bool, tuple[Breakpoint, ...]] = {}

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

    def add(self, request: SetBreakpoint, shape: ModelShape) -> Breakpoint:
        """Add the breakpoint asked for, or refuse it and change nothing."""
        made = Breakpoint(
            id=self._next_id,
            point=shape.point(_one_location(request)),
            when=_known_phase(request.when),
            condition=None if request.condition is None else parse_condition(request.condition),
            ignore=_count(request.ignore),
            once=request.once,
        )
        self._next_id += 1
        self._all[made.id] = made
        self._armed.clear()
        return made

    def remove(self, found: Breakpoint) -> None:
        del self._all[found.id]
        self._armed.clear()

    def enable(self, found: Breakpoint, enabled: bool) -> None:
        found.enabled = enabled
        self._armed.clear()

    def armed(self, prefill: bool) -> tuple[Breakpoint, ...]:
        """Enabled breakpoints of this phase, in the order of their points, then of their ids."""
        made = self._armed.get(prefill)
        if made is None:
            skipped = "decode" if prefill else "prefill"
            made = tuple(
                sorted(
                    (b for b in self._all.values() if b.enabled and b.when != skipped),
                    key=lambda b: (b.point, b.id),
                )
            )
            self._armed[prefill] = made
        return made

    def reached(
        self,
        armed: Iterable[Breakpoint],
        points: tuple[Point, Point],
        held: Mapping[int, tuple[int, ...]],
    ) -> list[Breakpoint]:
        """Count what was passed or reached; returns the breakpoints that stop at the last point.

        armed: those the engine was told of. points: where it stood before, and stands now.
        held: breakpoint id -> positions at which its condition held, at the last point.
        """
        stopping = []
        for found in armed:
            if not points[0] < found.point <= points[1]:
                continue
            if not found.enabled or self._all.get(found.id) is not found:
                continue  # disabled or removed while the engine was on its way
            if found.count(found.condition is None or found.id in held):
                # a sure one would have ended the stretch, so nothing that stops was passed
                assert found.point == points[1], f"breakpoint {found.id} was run past"
                stopping.append(found)
        if any(not found.enabled for found in stopping):
            self._armed.clear()
        return stopping

    def copy(self) -> Breakpoints:
        """The same breakpoints with their counts, for a fork."""
        made = Breakpoints()
        made._all = {key: replace(found) for key, found in self._all.items()}
        made._next_id = self._next_id
        return made

    def info(self, num_layers: int) -> tuple[BreakpointInfo, ...]:
        return tuple(found.info(num_layers) for found in self._all.values())

    def check(self) -> None:
        """Assert that counts fit each other and the cache is fresh."""
        for found in self._all.values():
            assert 0 <= found.stops <= found.held <= found.hits, f"counts of {found}"
            assert found.id < self._next_id
        for prefill, armed in self._armed.items():
            skipped = "decode" if prefill else "prefill"
            fresh = {b.id for b in self._all.values() if b.enabled and b.when != skipped}
            assert {b.id for b in armed} == fresh, "armed breakpoints are stale"


def _one_location(request: SetBreakpoint) -> str:
    if request.kind != "breakpoint" or len(request.locations) != 1:
        raise BadArgument(
            f"a breakpoint has one location, not {len(request.locations)}: set one for each"
        )
    return request.locations[0]


def _known_phase(when: When) -> When:
    if when not in get_args(When):
        raise BadArgument(f"when is {when!r}: choose 'any', 'prefill' or 'decode'")
    return when


def _count(ignore: int) -> int:
    if isinstance(ignore, bool) or not isinstance(ignore, int) or ignore < 0:
        raise BadArgument(f"ignore is {ignore!r}: give how many times to pass, 0 or more")
    return ignore
