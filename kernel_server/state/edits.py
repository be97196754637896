"""The edits of a session: what is accepted, in which forwards one applies, and what it did.

An edit is made at a stop for the place the session stands at, or one ahead. A *once* edit belongs
to the forward it was made in; a *sticky* one applies in every later forward in which its selector
matches. Several apply in the order they were made. Arithmetic is the engine's; when a value is
computed anew is decided by the requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kernel_server.protocol.errors import BadEdit, BadMessage, BadSelector, UnknownEdit
from kernel_server.protocol.location import location_at, parse_location
from kernel_server.protocol.messages import EDIT_KINDS, EditInfo, EditSpec
from kernel_server.state.events import EditResult
from kernel_server.state.instructions import EditPlan
from kernel_server.state.selectors import TokenSelector, describe, resolve_channels
from kernel_server.state.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a session stands, as far as edits are concerned."""

    forward: int
    point: int
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
    point: int
    selector: TokenSelector
    channels: tuple[int, ...] | None
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
            channels=self.channels,
        )

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
            description=_description(self, num_layers),
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


# --- accepting an edit ------------------------------------------------------------------------


def make_edit(
    spec: EditSpec, shape: ModelShape, stand: Standing, *, edit_id: int, stop_number: int
) -> Edit:
    """The edit asked for, or `BadEdit` / `BadSelector` / `UnknownLocation` saying why not."""
    location = parse_location(spec.location, shape.num_layers)
    point = location.point(shape.num_layers)
    _check_numbers(spec)
    selector = TokenSelector(spec.tokens, stand.num_prompt_tokens)
    edit = Edit(
        id=edit_id,
        spec=spec,
        point=point,
        selector=selector,
        channels=resolve_channels(spec.channels, shape.width(point)),
        made_at_stop=stop_number,
        forward=stand.forward,
    )
    last_only = point == shape.logits
    if edit.sticky:
        _check_sticky(edit, stand, last_only)
    else:
        _check_once(edit, stand, last_only, shape.num_layers)
    count = shape.width(point) if edit.channels is None else len(edit.channels)
    _check_value_shape(edit, stand, last_only, count)
    return edit


def _check_numbers(spec: EditSpec) -> None:
    kind = spec.kind
    if kind not in EDIT_KINDS:
        raise BadEdit(f"edit kind {kind!r} is not one of {', '.join(EDIT_KINDS)}")
    if spec.upload_id is not None:
        raise BadEdit(f"upload {spec.upload_id!r} of the edit's value has not arrived")
    if (spec.factor is not None) != (kind == "scale"):
        raise BadEdit(
            "scale needs a factor" if kind == "scale" else f"{kind} takes no factor, scale does"
        )
    if (spec.value is not None) != (kind in ("add", "set")):
        raise BadEdit(f"{kind} {'needs a' if kind in ('add', 'set') else 'takes no'} value")
    if kind != "add" and spec.alpha != 1.0:
        raise BadEdit(f"{kind} takes no alpha, add does")
    for name, number in (("factor", spec.factor), ("alpha", spec.alpha)):
        if number is not None and not math.isfinite(number):
            raise BadEdit(f"{name} is {number}: give a finite number")
    if spec.value is None:
        return
    try:
        values = spec.value.numpy()
    except (BadMessage, ValueError, TypeError) as error:
        raise BadEdit(f"the edit's value cannot be read: {error}") from None
    if values.ndim > 2 or values.size == 0:
        raise BadEdit(
            f"the value has shape {list(values.shape)}: give a scalar, a vector [channels] or"
            " [tokens, channels]"
        )
    if bad := int(values.size - np.count_nonzero(np.isfinite(values))):
        raise BadEdit(f"{bad} of {values.size} elements of the value are NaN or infinite")


def _check_value_shape(edit: Edit, stand: Standing, last_only: bool, channels: int) -> None:
    value = edit.spec.value
    if value is None or not value.shape:
        return
    if value.shape[-1] != channels:
        raise BadEdit(
            f"the value has shape {list(value.shape)}, and {channels} channels are selected: its"
            f" last dimension must be {channels}"
        )
    if len(value.shape) == 1:
        return
    if edit.sticky:
        raise BadEdit(
            f"a sticky edit takes a scalar or one vector [channels], not {list(value.shape)}:"
            " later forwards feed other tokens"
        )
    tokens = len(edit.positions_in(stand, last_only))
    if value.shape[0] != tokens:
        raise BadEdit(
            f"the value has shape {list(value.shape)}, and {tokens} tokens are selected: it must"
            f" be [{tokens}, {channels}] or [{channels}]"
        )


def _check_once(edit: Edit, stand: Standing, last_only: bool, num_layers: int) -> None:
    """A once edit must find its tokens in the forward the session stands in, at or ahead."""
    name = str(location_at(edit.point, num_layers))
    if edit.point < stand.point:
        here = location_at(stand.point, num_layers)
        raise BadEdit(
            f"{name} has passed in forward {stand.forward}, which stands at {here}: step back is"
            " planned; launch again and stop there, or make the edit sticky to apply from forward"
            f" {stand.forward + 1}"
        )
    edit.selector.check_once(stand.end, stand.limit)
    positions = edit.positions_in(stand, last_only)
    selected = edit.selector.positions(stand.tokens, stand.first, stand.end)
    if edit.selector.kind == "indices":
        missing = [
            position
            for index in edit.selector.selector.indices
            if not stand.first
            <= (position := index + stand.end if index < 0 else index)
            < stand.end
        ]
        if missing:
            raise BadEdit(_elsewhere(missing[0], stand))
    if not selected:
        raise BadEdit(_nothing_here(edit.selector, stand))
    if not positions:
        raise BadEdit(
            f"logits are edited for the last token only: select token {stand.end - 1} (-1)"
        )
    edit.note = _note(edit, stand, positions, selected)


def _note(
    edit: Edit, stand: Standing, positions: tuple[int, ...], selected: tuple[int, ...]
) -> str | None:
    """What the user may not have expected of the selection."""
    notes = []
    if edit.selector.kind == "text" and len(selected) > 1:
        notes.append(f"{edit.selector} occurs {len(selected)} times: {_listed(selected)}")
    if len(positions) < len(selected) and edit.selector.kind != "all":
        notes.append(f"of {len(selected)} tokens only the last has logits: {positions[0]}")
    if edit.selector.kind in ("slice", "text") and stand.first > 0:
        earlier = edit.selector.positions(stand.tokens, 0, stand.first)
        if earlier:
            notes.append(
                f"{len(earlier)} more tokens selected were fed in earlier forwards and are not"
                " changed"
            )
    return "; ".join(notes) or None


def _elsewhere(position: int, stand: Standing) -> str:
    holder = stand.forward_of(position)
    here = f"forward {stand.forward} feeds tokens {stand.first} to {stand.end - 1}"
    if stand.first == stand.end - 1:
        here = f"forward {stand.forward} feeds token {stand.first}"
    if holder < stand.forward:
        return (
            f"token {position} was fed in forward {holder}; {here}: step back is planned; launch"
            f" again and stop in forward {holder}, then edit"
        )
    return (
        f"token {position} is fed in forward {holder}; {here}: stop there, or make the edit sticky"
    )


def _nothing_here(selector: TokenSelector, stand: Standing) -> str:
    earlier = selector.positions(stand.tokens, 0, stand.first) if stand.first else ()
    if earlier:
        return _elsewhere(earlier[0], stand)
    return (
        f"no token of forward {stand.forward} (tokens {stand.first} to {stand.end - 1}) is"
        f" selected by {selector}: select others, or make the edit sticky"
    )


def _check_sticky(edit: Edit, stand: Standing, last_only: bool) -> None:
    """A sticky edit starts where its location is reached next, and must be able to match."""
    behind = edit.point < stand.point
    if edit.point == stand.point and not edit.positions_in(stand, last_only):
        behind = True  # nothing to do at this stop: it starts at the next forward
    if behind:
        edit.forward = stand.forward + 1
    if edit.selector.kind == "indices":
        for index in edit.selector.selector.indices:
            if index >= stand.limit:
                raise BadSelector(
                    f"token {index} lies outside the session: it feeds tokens 0 to"
                    f" {stand.limit - 1}"
                )
    if not _can_match(edit, stand, last_only):
        raise BadEdit(
            f"{edit.selector} selects no token of forward {edit.forward} or later, which"
            f" {_feeds(edit.forward, stand)}: the edit could never match"
        )
    if not behind and edit.selector.kind == "text":
        selected = edit.selector.positions(stand.tokens, stand.first, stand.end)
        edit.note = _note(edit, stand, selected, selected) if selected else None


def _feeds(forward: int, stand: Standing) -> str:
    start = 0 if forward == 0 else stand.num_prompt_tokens + forward - 1
    if start >= stand.limit:
        return "will not come"
    return f"feed tokens {start} to {stand.limit - 1}"


def _can_match(edit: Edit, stand: Standing, last_only: bool) -> bool:
    selector = edit.selector
    if edit.forward == stand.forward and edit.positions_in(stand, last_only):
        return True
    for forward in range(max(edit.forward, stand.forward + 1), stand.max_new_tokens):
        end = stand.num_prompt_tokens + forward
        position = end - 1
        known = stand.tokens[position] if position < len(stand.tokens) else None
        if selector.matches(position, end, known):
            return True
    return False


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


def _listed(positions: Sequence[int]) -> str:
    shown = ", ".join(map(str, positions[:8]))
    return f"positions {shown}" + (", …" if len(positions) > 8 else "")


def _description(edit: Edit, num_layers: int) -> str:
    spec = edit.spec
    value = ""
    if spec.value is not None:
        scalar = not spec.value.shape
        value = f" {float(spec.value.numpy()):g}" if scalar else f" value {list(spec.value.shape)}"
    text = {
        "scale": f"scale {spec.factor:g}" if spec.factor is not None else "scale",
        "add": (f"add {spec.alpha:g} ×" if spec.alpha != 1.0 else "add") + value,
        "set": f"set{value}",
        "zero": "zero",
    }[spec.kind]
    text += f" at {location_at(edit.point, num_layers)}, tokens {edit.selector}"
    if spec.channels.kind != "all":
        text += f", channels {describe(spec.channels)}"
    return text + (", sticky" if spec.sticky else "")
