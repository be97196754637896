"""The tree of a session's stops: which there are, how they hang together, and what is kept of each.

A *node* is a place where the session stood still: a stop, its end, or the start. The session's own
*line* is the way from the start to where it stands; what lay ahead when it went back lies on hidden
*branches*, each with the pages of its last node. A node needs no pages of its own: those of its
line hold it, as far as it had come. What a request does to the tree is decided in `branching`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from kernel_server.protocol.errors import UnknownNode
from kernel_server.protocol.location import Point
from kernel_server.protocol.messages import ErrorInfo, FinishReason, StopInfo
from kernel_server.state.edits import Edit, Edits
from kernel_server.state.stepping import Target

#: Edits made in one forward so far, with the positions each changed.
Applied = tuple[tuple[Edit, tuple[int, ...]], ...]
#: A place in a session: forward and point.
Cursor = tuple[int, Point]

NO_EDITS = Edits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One place where the session stood still."""

    #: that of the stop at which it was made
    number: int
    parent: int | None
    status: Literal["waiting", "stopped", "finished"]
    cursor: Cursor
    layers_replayed: int = 0
    stop: StopInfo | None = None
    finish_reason: FinishReason | None = None
    error: ErrorInfo | None = None
    #: as they were when the session left it, at the stop of this number; None: it never did
    edits: Edits | None = None
    left_at: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A way that is run again: to a node, or to a place between two, as it went the first time."""

    node: int | None
    #: the last node on that way, which is then behind the session
    after: int
    target: Target
    #: by forward, the edits that were made in it
    applied: Mapping[int, Applied]
    #: the tokens that were drawn
    tokens: tuple[int, ...]
    #: figures of the session's edits are those of this place; what is passed later counts
    known_until: Cursor | None
    #: where breakpoints read the lens last in the last forward, by id; they are not judged
    reads: tuple[tuple[int, Point], ...] = ()

    def reads_in(self, forward: int, start: Point, until: Point) -> tuple[tuple[int, Point], ...]:
        """What is to be read in this forward between two points."""
        if forward != self.target.forward:
            return ()
        return tuple(read for read in self.reads if start < read[1] <= until)

    def plans(self, forward: int, point: Point) -> list[tuple[Edit, tuple[int, ...]]]:
        """Edits to be made in this forward beyond a point."""
        return [entry for entry in self.applied.get(forward, ()) if entry[0].point > point]

    def until(self, forward: int, sampled: Point) -> Point:
        """How far it runs in this forward."""
        return self.target.point if forward == self.target.forward else sampled


@dataclass(slots=True)
class KeptStop:
    """Tensors kept of a stop that was left; forks of the session share them."""

    #: of all that were ever kept
    id: int
    node: int
    #: at most
    nbytes: int
    #: the sessions
    holders: dict[str, None]


@dataclass(slots=True)
class Tree:
    """The nodes of one session."""

    nodes: dict[int, Node] = field(
        default_factory=lambda: {0: Node(number=0, parent=None, status="waiting", cursor=(0, -1))}
    )
    #: the node it stands at, or came from
    current: int = 0
    #: nodes that lie on a branch, with its id; the others are on the session's own line
    away: dict[int, str] = field(default_factory=dict)
    #: branches, with the last node of each
    lines: dict[str, int] = field(default_factory=dict)
    #: nodes whose tensors are kept, those left longest ago first
    kept: dict[int, KeptStop] = field(default_factory=dict)
    #: nodes that are listed no more, because there were too many
    num_forgotten: int = 0
    lines_made: int = 0
    #: forwards before this one were drawn by another sampler, of the session it was forked from
    sampled_from: int = 0

    def get(self, number: int) -> Node:
        """The node of this number, or `UnknownNode`."""
        found = self.nodes.get(number)
        if found is None:
            raise UnknownNode(
                f"no node {number}: the session has {len(self.nodes)}, branches() lists them"
            )
        return found

    @property
    def here(self) -> Node:
        return self.nodes[self.current]

    def path(self, number: int | None) -> Iterator[Node]:
        """A node and those before it, the nearest first."""
        while number is not None:
            node = self.nodes[number]
            yield node
            number = node.parent

    def own(self) -> list[int]:
        """Numbers of the nodes on the session's own line."""
        return [number for number in self.nodes if number not in self.away]

    def below(self, number: int) -> set[int]:
        """A node and all that came after it, on any branch."""
        found = {number}
        for node in self.nodes.values():  # parents come before their children
            if node.parent in found:
                found.add(node.number)
        return found

    def heir(self) -> str | None:
        """A branch that holds the current node too, since it came after it."""
        for line, tip in self.lines.items():
            if any(node.number == self.current for node in self.path(tip)):
                return line
        return None

    def add(self, node: Node) -> None:
        self.nodes[node.number] = node
        self.current = node.number

    def forget(self, number: int) -> None:
        """Take a node out of the list; those after it hang from the one before."""
        gone = self.nodes.pop(number)
        self.away.pop(number, None)
        for other in list(self.nodes.values()):
            if other.parent == number:
                self.nodes[other.number] = replace(other, parent=gone.parent)
        self.num_forgotten += 1

    def of_fork(self, sampler: tuple[object, ...]) -> Tree:
        """The way to the current node, for a fork; sampler: what it changes of that, else None."""
        same_sampler = all(one is None for one in sampler)
        nodes = {node.number: node for node in self.path(self.current)}
        return Tree(
            nodes=dict(sorted(nodes.items())),
            current=self.current,
            kept={number: kept for number, kept in self.kept.items() if number in nodes},
            num_forgotten=self.num_forgotten,
            sampled_from=self.sampled_from if same_sampler else self.here.cursor[0],
        )

    def check(self) -> None:
        """Assert that the own line is the way to the current node, and no branch is empty."""
        if not self.nodes:
            return  # the session failed
        way = {node.number for node in self.path(self.current)}
        assert set(self.own()) == way, f"own line {self.own()}, way {way}"
        assert set(self.away.values()) == set(self.lines), "a branch is empty or unknown"
        assert set(self.kept) <= set(self.nodes), "tensors of a node that is gone"
        for line, tip in self.lines.items():
            held = {number for number, where in self.away.items() if where == line}
            assert held <= {node.number for node in self.path(tip)}, f"{line} holds {held}"
            assert self.away.get(tip) == line, f"the end of {line} lies elsewhere"
        for node in self.nodes.values():
            assert node.parent is None or self.nodes[node.parent].cursor <= node.cursor


def cut(applied: Mapping[int, Applied], cursor: Cursor) -> dict[int, Applied]:
    """Of the edits made, those made up to a place."""
    found = {}
    for forward, entries in applied.items():
        kept = tuple(entry for entry in entries if (forward, entry[0].point) <= cursor)
        if kept:
            found[forward] = kept
    return found
