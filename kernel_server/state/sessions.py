"""A session as data, and the moves its status may make.

Everything that determines a session is here: tokens, cursor, page tables, breakpoints, edits,
sampler. When a move happens is decided by `control` and `running`; which moves there are, by the
table below, from which the diagram in STATUS.md is drawn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kernel_server.protocol.arrays import Array
from kernel_server.protocol.location import (
    NOT_STARTED,
    Point,
    layers_begun,
    layers_executed,
    location_at,
    logits_point,
)
from kernel_server.protocol.messages import (
    EditInfo,
    ErrorInfo,
    FinishReason,
    SessionInfo,
    Status,
    StopInfo,
)
from kernel_server.protocol.token_list import TokenList
from kernel_server.state.branches import Applied, Replay, Tree
from kernel_server.state.breakpoints import Breakpoints
from kernel_server.state.edits import Edit, Edits, Standing, positions_here
from kernel_server.state.events import Requested
from kernel_server.state.instructions import Captures, Sampling
from kernel_server.state.pages import PageTable
from kernel_server.state.shape import ModelShape
from kernel_server.state.stepping import Target

#: (from, to) -> what causes the move. Terminate ends a session in any status.
MOVES: dict[tuple[Status, Status], str] = {
    ("waiting", "running"): "continue, next, step_out, run_to, or launch with stop_on_entry",
    ("stopped", "running"): "continue, next, step_out, run_to, or going back by running again",
    ("finished", "running"): "going back by running again",
    ("running", "stopped"): "breakpoint, step, pause, or an exception within a forward",
    ("running", "waiting"): "no room for a forward that has not begun",
    ("running", "finished"): "end of sequence, or max_new_tokens",
    ("running", "failed"): "the model raised",
    ("stopped", "failed"): "a fault of the server",
}

#: What each status means, for the diagram.
MEANINGS: dict[Status, str] = {
    "waiting": "no forward begun, nothing runs",
    "running": "queued, or in the engine",
    "stopped": "stands at a location",
    "finished": "all tokens drawn",
    "failed": "lost; holds nothing",
}


@dataclass(slots=True)
class PendingEdits:
    """Edits the engine was asked to apply; the session's list changes when it has."""

    request_id: int
    action: Literal["add", "enable", "disable", "remove"]
    edit: Edit
    #: positions each edit changes, by edit id
    positions: dict[int, tuple[int, ...]]


@dataclass(slots=True, kw_only=True)
class Session:
    """One prompt being debugged."""

    id: str
    owner: str
    name: str
    parent: str | None
    #: prompt and generated token ids; `draw` adds to them, nothing else changes the list itself
    tokens: list[int]
    #: the prompt once more, as a forward is told of it
    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    #: physical pages by page group
    tables: list[PageTable]
    status: Status = "waiting"
    forward: int = 0
    #: the point last reached in this forward
    point: Point = NOT_STARTED
    layers_replayed: int = 0
    stop_number: int = 0
    stop: StopInfo | None = None
    finish_reason: FinishReason | None = None
    error: ErrorInfo | None = None
    target: Target | None = None
    pausing: bool = False
    #: seconds of the server's clock: when it was last asked for or came to rest, and when it is to
    #: go on
    touched: float = 0.0
    resumes_at: float | None = None
    #: the list of its tokens is a fork's or its parent's too
    tokens_shared: bool = field(default=False, compare=False)
    #: as many of its tokens as were last told, with the list they are of
    told: tuple[list[int], TokenList] | None = field(default=None, compare=False)
    #: the prompt as records hold it, once one was made: forks have the same
    prompt_array: Array | None = field(default=None, compare=False)
    #: by group, the page table and its device slots, as they were in this epoch
    slots: dict[int, tuple[PageTable, tuple[int, ...]]] = field(default_factory=dict)
    slots_epoch: int = -1
    #: how many of its pages each tier has, with what that was counted of
    counted: tuple[int, tuple[PageTable, ...], dict[str, int]] | None = None
    #: its pages never leave the device
    pinned: bool = False
    #: it has left the device for being idle, since it was last asked for
    idled: bool = False
    #: where all pages were when its own did not fit below
    stuck_at: tuple[Any, ...] | None = None
    #: what was noted last of why its pages stay where they are
    noted_last: tuple[str, str] | None = None
    #: under which it ran; what an accepted difference of it is replaced by
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    #: it has gone on under another fingerprint than its own
    inexact: bool = False
    #: it came back from a journal, or its lease ended: its pages and tensors are computed when they
    #: are needed
    dormant: bool = False
    #: it is dormant because its lease ended
    lease_ended: bool = False
    #: why it may not be rebuilt here, unless that is accepted
    refused: str | None = None
    #: computed again, the first forward whose token came out otherwise
    differs_from: int | None = None
    #: why rebuilding it did not work the last time
    not_rebuilt: ErrorInfo | None = None
    #: the stop from which it ran when its server ended: to go on from there is not stale
    ran_from: int | None = None
    #: a scratch fork: in no list, publishes nothing
    scratch: bool = False
    #: likewise, and it never runs: what lay ahead of a session that went back
    branch: bool = False
    captures: Captures | None = None
    #: counts every change a client could see
    revision: int = 0
    breakpoints: Breakpoints = field(default_factory=Breakpoints)
    edits: Edits = field(default_factory=Edits)
    #: where it has stood, and what is kept of that
    tree: Tree = field(default_factory=Tree)
    #: edits made, by forward; what a forward that is run again needs
    applied: dict[int, Applied] = field(default_factory=dict)
    replay: Replay | None = None
    pending: PendingEdits | None = None
    #: requests that wait until pending edits are applied
    deferred: deque[Requested] = field(default_factory=deque)

    @property
    def first_token(self) -> int:
        """Absolute position of the first token fed in this forward."""
        return 0 if self.forward == 0 else len(self.prompt) + self.forward - 1

    @property
    def end_token(self) -> int:
        """One past the last token fed in this forward."""
        return len(self.prompt) + self.forward

    @property
    def fed(self) -> tuple[int, ...]:
        """Token ids fed in this forward."""
        return self.prompt if self.forward == 0 else (self.tokens[self.end_token - 1],)

    @property
    def finished_forwards(self) -> int:
        return len(self.tokens) - len(self.prompt)

    def draw(self, token: int) -> None:
        """Add a token; a list that others have stays theirs as it is."""
        if self.tokens_shared:
            self.tokens, self.tokens_shared = list(self.tokens), False
        self.tokens.append(token)

    def token_list(self) -> TokenList:
        """Its tokens as they are told, one object for as long as they are the same."""
        if self.told is None or self.told[0] is not self.tokens:
            self.told = self.tokens, TokenList(self.tokens)
        elif len(self.told[1]) < len(self.tokens):
            self.told = self.tokens, self.told[1] + self.tokens[len(self.told[1]) :]
        return self.told[1]

    def share_tokens(self) -> list[int]:
        """The same list for a fork, until one of the two draws a token."""
        self.tokens_shared = True
        return self.tokens

    def standing(self) -> Standing:
        """Where it stands, for edits and selectors."""
        return Standing(
            self.forward, self.point, len(self.prompt), self.max_new_tokens, self.tokens
        )

    def sampling(self) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            position=self.end_token,
        )

    def edit_lists(self) -> list[Edits]:
        """Its edits, and as they were at the places it can return to, each list once."""
        then = [node.edits for node in self.tree.nodes.values() if node.edits is not None]
        return [*{id(edits): edits for edits in (self.edits, *then)}.values()]

    def move_to(self, status: Status) -> None:
        """Change the status by a legal move."""
        assert (self.status, status) in MOVES, f"{self.id}: {self.status} → {status} is no move"
        self.status = status

    def place(self, num_layers: int) -> str:
        """Where it stands, in words for messages."""
        if self.status == "finished":
            return f"finished after {self.finished_forwards} tokens"
        if self.point == NOT_STARTED:
            preposition = "in" if self.status == "running" else "before"
            return f"{self.status} {preposition} forward {self.forward}"
        where = location_at(min(self.point, num_layers + 2), num_layers)
        return f"{self.status} at {where}, forward {self.forward}"

    def edit_infos(self, num_layers: int) -> tuple[EditInfo, ...]:
        """All edits; `at_this_stop` is true of those whose place is the stop it stands at."""
        if not len(self.edits):
            return ()
        stand, logits = self.standing(), logits_point(num_layers)
        stopped = self.status == "stopped"
        return tuple(
            edit.info(num_layers, stopped and bool(positions_here(edit, stand, logits)))
            for edit in self.edits
        )

    def info(self, shape: ModelShape, event_seq: int, pages_in: Mapping[str, int]) -> SessionInfo:
        """All a client needs to show it. pages_in: by tier, how many of its pages are there."""
        num_pages = sum(map(len, self.tables))
        started = self.point != NOT_STARTED
        reached = min(self.point, shape.logits)
        return SessionInfo(
            id=self.id,
            name=self.name,
            owner=self.owner,
            status=self.status,
            tokens=self.token_list(),
            num_prompt_tokens=len(self.prompt),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            forward=self.forward,
            location=str(location_at(reached, shape.num_layers)) if started else None,
            layers_executed=layers_executed(self.point, shape.num_layers),
            layers_replayed=self.layers_replayed,
            stop_number=self.stop_number,
            stop=self.stop,
            finish_reason=self.finish_reason,
            error=self.error,
            parent=self.parent,
            num_pages=num_pages,
            kv_bytes=num_pages * shape.page_bytes,
            device_pages=pages_in["device"],
            host_pages=pages_in["host"],
            disk_pages=pages_in["disk"],
            pinned=self.pinned,
            revision=self.revision,
            event_seq=event_seq,
            breakpoints=self.breakpoints.info(),
            edits=self.edit_infos(shape.num_layers),
            dormant=self.dormant,
            lease_ended=self.lease_ended,
            inexact=self.inexact,
            refused=self.refused,
            differs_from=self.differs_from,
        )

    def check(self, shape: ModelShape) -> None:
        """Assert what must hold of one session by itself."""
        self.breakpoints.check()
        self.edits.check()
        self.tree.check()
        if self.told is not None and self.told[0] is self.tokens:
            known = tuple(self.told[1])
            assert known == tuple(self.tokens[: len(known)]), f"{self.id}: other tokens were told"
        drawn = self.finished_forwards
        done = self.point == shape.sampled
        assert drawn == self.forward + done, f"{self.id}: {drawn} tokens drawn"
        assert done == (self.status == "finished") or self.status == "failed", f"{self.id}: {self}"
        assert NOT_STARTED <= self.point <= shape.sampled
        assert (self.stop is not None) == (self.status == "stopped"), f"{self.id}: stop"
        assert (self.finish_reason is not None) == (self.status == "finished")
        if self.status == "stopped":
            assert self.point != NOT_STARTED, f"{self.id} is stopped nowhere"
            assert self.stop is not None and self.stop.number == self.stop_number
        if self.status == "waiting":
            assert self.point == NOT_STARTED
        if self.status != "running":
            rests = self.target is None and not self.pausing and self.replay is None
            assert rests, f"{self.id} rests and is to run on"
        elif self.target is not None:
            ahead = (self.target.forward, self.target.point) > (self.forward, self.point)
            assert ahead, f"{self.id} has passed {self.target}"
        assert self.pending is None or self.status == "stopped"
        assert self.pending is not None or not self.deferred, f"{self.id} forgot requests"
        if self.status == "failed":
            assert not any(self.tables), f"{self.id} failed and holds pages"
            return
        if self.dormant:
            assert self.status in ("waiting", "stopped", "finished")
            assert not any(self.tables), f"{self.id} is dormant and holds pages"
            return
        begun = shape.groups_begun(layers_begun(self.point, shape.num_layers))
        for group, table in enumerate(self.tables):
            needed = self.end_token if group < begun else self.first_token
            most = self.end_token if self.status == "running" else needed
            assert shape.pages_for(needed) <= len(table) <= shape.pages_for(most), (
                f"{self.id}: group {group} has {len(table)} pages for {needed} tokens"
            )
