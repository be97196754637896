"""The edits of a session: in which forwards one applies, and what it did.

An edit is made at a stop for the place the session stands at, or one ahead. A *once* edit belongs
to the forward it was made in; a *sticky* one applies in every later forward in which its selector
matches. Several apply in the order they were made. What is accepted is decided in `edit_rules`;
arithmetic is the engine's; when a value is computed anew is decided by the requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from kernel_server.protocol.errors import UnknownEdit
from kernel_server.protocol.location import Point, location_at
from kernel_server.protocol.messages import EditInfo, EditSpec
from kernel_server.state.edit_text import description
from kernel_server.state.events import EditResult
from kernel_server.state.instructions import EditPlan
from kernel_server.state.selectors import TokenSelector, resolve_elements


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a session stands, as far as edits are concerned."""

    forward: int
    point: Point
    num_prompt_tokens: int
    max_new_tokens: int
    #: ids of all tokens, prompt and generated
    tokens: Sequence[int]

    @property
    def first(self) -> int:
        """Absolute position of the first token fed in this forward."""
        return 0 if self.forward == 0 else self.end - 1

    @property
    def end(self) -> int:
        return self.num_prompt_tokens + self.forward

    @property
    def limit(self) -> int:
        """Positions that can ever be fed: the last token drawn is not."""
        return self.num_prompt_tokens + self.max_new_tokens - 1

    def forward_of(self, position: int) -> int:
        """The forward that feeds this position."""
        return max(position - self.num_prompt_tokens + 1, 0)


@dataclass(slots=True, kw_only=True)
class Edit:
    """One edit with what it did."""

    id: int
    spec: EditSpec
    point: Point
    selector: TokenSelector
    #: heads (None without) and channels of the tensor; no channels: as many as there are keys
    layout: tuple[int | None, int]
    #: number of the stop at which it was made
    made_at_stop: int
    #: the first forward it may apply in; a once edit applies in no other
    forward: int
    enabled: bool = True
    note: str | None = None
    #: the last forward in which its location was reached while it was enabled
    reached_in: int = -1
    positions: tuple[int, ...] = ()
    elements_changed: int | None = None
    norm_before: float | None = None
    norm_after: float | None = None
    forwards_matched: int = 0
    forwards_unmatched: int = 0
    #: the same in every forward, unless channels are keys
    _elements: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.layout[1]:
            self._elements = resolve_elements(self.spec.heads, self.spec.channels, self.layout)

    @property
    def sticky(self) -> bool:
        return self.spec.sticky

    def lives_in(self, forward: int) -> bool:
        """Whether it may apply in this forward, given that it is enabled."""
        return self.forward <= forward if self.sticky else self.forward == forward

    def positions_in(self, stand: Standing, last_only: bool) -> tuple[int, ...]:
        """The positions it changes in the forward the session stands in; `last_only` at logits."""
        if last_only:
            last = stand.end - 1
            found = self.selector.matches(last, stand.end, stand.tokens[last])
            return (last,) if found else ()
        return self.selector.positions(stand.tokens, stand.first, stand.end)

    def plan(self, positions: tuple[int, ...], first: int, end: int, last_only: bool) -> EditPlan:
        """The edit for one forward. At the logits the tensor has one row, so rows are None."""
        everything = last_only or positions == tuple(range(first, end))
        return EditPlan(
            edit_id=self.id,
            point=self.point,
            spec=self.spec,
            rows=None if everything else tuple(p - first for p in positions),
            channels=self.elements(end),
        )

    def elements(self, end: int) -> tuple[int, ...] | None:
        """Elements of a token's vector that it changes in a forward of `end` tokens, heads
        flattened; None for all."""
        if self.layout[1]:
            return self._elements
        keys = (self.layout[0], end)
        return resolve_elements(self.spec.heads, self.spec.channels, keys)

    def passed(self, forward: int, positions: tuple[int, ...], result: EditResult | None) -> None:
        """Note what it did in this forward; noting the same forward again replaces the figures."""
        if self.reached_in != forward:
            self.reached_in = forward
            if positions:
                self.forwards_matched += 1
            else:
                self.forwards_unmatched += 1
        if positions:
            self.positions = positions
        if result is not None:
            self.elements_changed = result.elements_changed
            self.norm_before = result.norm_before
            self.norm_after = result.norm_after
            if result.note is not None:
                self.note = result.note

    def taken_back(self) -> None:
        """It is no longer part of the forward it was last applied in."""
        self.reached_in = -1
        self.forwards_matched -= 1
        self.positions = ()
        self.elements_changed = self.norm_before = self.norm_after = None

    def info(self, num_layers: int, here: bool) -> EditInfo:
        return EditInfo(
            id=self.id,
            kind=self.spec.kind,
            location=str(location_at(self.point, num_layers)),
            description=description(self, num_layers),
            sticky=self.sticky,
            enabled=self.enabled,
            forward=self.forward,
            at_this_stop=here,
            elements_changed=self.elements_changed,
            norm_before=self.norm_before,
            norm_after=self.norm_after,
            tokens_matched=self.positions,
            forwards_matched=self.forwards_matched,
            forwards_unmatched=self.forwards_unmatched,
            note=self.note,
        )


class Edits:
    """The edits of one session, by id, in the order they were made."""

    def __init__(self) -> None:
        self._all: dict[int, Edit] = {}
        self.next_id = 1
        #: enabled sticky edits, and enabled once edits by forward; None: to be made anew
        self._index: tuple[list[Edit], dict[int, list[Edit]]] | None = None

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._all.values())

    def get(self, edit_id: int) -> Edit:
        """The edit with this id, or `UnknownEdit`."""
        found = self._all.get(edit_id)
        if found is None:
            have = ", ".join(map(str, self._all)) or "none"
            raise UnknownEdit(f"no edit {edit_id}: the session has {have}")
        return found

    def has(self, edit: Edit) -> bool:
        return self._all.get(edit.id) is edit

    def add(self, edit: Edit) -> None:
        self._all[edit.id] = edit
        self.next_id = edit.id + 1
        self._index = None

    def remove(self, edit: Edit) -> None:
        del self._all[edit.id]
        self._index = None

    def enable(self, edit: Edit, enabled: bool) -> None:
        edit.enabled = enabled
        self._index = None

    def live(self, forward: int) -> list[Edit]:
        """Enabled edits that may apply in this forward, in the order they were made."""
        if self._index is None:
            self._index = self._make_index()
        sticky, once = self._index
        found = [edit for edit in sticky if edit.forward <= forward]
        if forward in once:
            found = sorted(found + once[forward], key=lambda edit: edit.id)
        return found

    def _make_index(self) -> tuple[list[Edit], dict[int, list[Edit]]]:
        sticky: list[Edit] = []
        once: dict[int, list[Edit]] = {}
        for edit in self._all.values():
            if edit.enabled:
                (sticky if edit.sticky else once.setdefault(edit.forward, [])).append(edit)
        return sticky, once

    def copy(self) -> Edits:
        """The same edits with their ids and figures, for a fork."""
        made = Edits()
        made._all = {key: replace(edit) for key, edit in self._all.items()}
        made.next_id = self.next_id
        return made

    def check(self) -> None:
        """Assert that ids and counts fit each other and the cache is fresh."""
        for edit in self._all.values():
            assert edit.id < self.next_id
            assert edit.forwards_matched >= 0 and edit.forwards_unmatched >= 0
            assert edit.sticky or edit.forwards_matched + edit.forwards_unmatched <= 1, edit
        assert self._index in (None, self._make_index()), "the index of edits is stale"


def plans_beyond(edits: Edits, stand: Standing, logits: int) -> list[tuple[Edit, tuple[int, ...]]]:
    """Edits at points still ahead in this forward, with the positions each changes there."""
    return [
        (edit, edit.positions_in(stand, edit.point == logits))
        for edit in edits.live(stand.forward)
        if edit.point > stand.point
    ]


def positions_here(edit: Edit, stand: Standing, logits: int) -> tuple[int, ...]:
    """The positions an edit changes at the place the session stands at; none: it is no part of
    that stop."""
    if edit.point != stand.point or not edit.lives_in(stand.forward):
        return ()
    return edit.positions_in(stand, stand.point == logits)


def at_stop(
    edits: Iterable[Edit], stand: Standing, logits: int
) -> list[tuple[Edit, tuple[int, ...]]]:
    """Enabled edits that belong to the stop, with the positions each changes, in order."""
    placed = ((edit, positions_here(edit, stand, logits)) for edit in edits if edit.enabled)
    return [(edit, positions) for edit, positions in placed if positions]
