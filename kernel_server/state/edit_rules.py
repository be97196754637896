"""Which edits are accepted: places, shapes and selections are judged before anything changes.

A refusal says what was found, with numbers, and the way to do it. What a kind takes is decided in
`edit_kinds`, what an accepted edit does in `edits`.
"""

from __future__ import annotations

from collections.abc import Sequence

from kernel_server.protocol.errors import BadEdit, BadSelector
from kernel_server.protocol.location import location_at
from kernel_server.protocol.messages import EditSpec
from kernel_server.state.edit_kinds import KINDS, check_arguments
from kernel_server.state.edits import Edit, Standing
from kernel_server.state.selectors import TokenSelector
from kernel_server.state.shape import ModelShape

#: Kinds that steer: meant for every token, they are usually meant for those to come as well.
_STEERS = ("scale", "add", "set", "zero", "clamp", "project_out", "ban")


def make_edit(
    spec: EditSpec, shape: ModelShape, stand: Standing, *, edit_id: int, stop_number: int
) -> Edit:
    """The edit asked for, or `BadEdit` / `BadSelector` / `UnknownLocation` saying why not."""
    point = shape.point(spec.location)
    check_arguments(spec, shape.vocab_size)
    if KINDS[spec.kind].of_next_token and point != shape.logits:
        raise BadEdit(
            f"{spec.kind} says what the next token is, so its place is the logits, not"
            f" {location_at(point, shape.num_layers)}: leave location out, or say 'logits'"
        )
    selector = TokenSelector(spec.tokens, stand.num_prompt_tokens)
    edit = Edit(
        id=edit_id,
        spec=spec,
        point=point,
        selector=selector,
        layout=shape.layout(point, 0),
        made_at_stop=stop_number,
        forward=stand.forward,
    )
    last_only = point == shape.logits
    if edit.sticky:
        _check_sticky(edit, stand, last_only)
    else:
        _check_once(edit, stand, last_only, shape.num_layers)
    heads, width = shape.layout(point, stand.end)
    elements = edit.elements(stand.end)
    count = (heads or 1) * width if elements is None else len(elements)
    _check_value_shape(edit, stand, last_only, count)
    return edit


def _check_value_shape(edit: Edit, stand: Standing, last_only: bool, channels: int) -> None:
    value = edit.spec.value
    if value is None or not value.shape:
        return
    name = "the value"
    if edit.spec.vector is not None:
        name = f"vector {edit.spec.vector!r}"
    elif edit.spec.source is not None:
        name = "the patch"
    if value.shape[-1] != channels:
        raise BadEdit(
            f"{name} has shape {list(value.shape)}, and {channels} channels are selected: its"
            f" last dimension must be {channels}"
        )
    if edit.sticky and not edit.layout[1] and edit.spec.channels.kind != "indices":
        raise BadEdit(
            "every forward has one key more, so a sticky edit of the attention pattern takes one"
            f" number, or channels listed one by one, not a value {list(value.shape)}"
        )
    if len(value.shape) == 1 or edit.spec.kind == "project_out":
        return
    if edit.sticky:
        raise BadEdit(
            f"a sticky edit takes a scalar or one vector [channels], not {list(value.shape)}:"
            " later forwards feed other tokens"
        )
    tokens = len(edit.positions_in(stand, last_only))
    if value.shape[0] != tokens:
        raise BadEdit(
            f"{name} has shape {list(value.shape)}, and {tokens} tokens are selected: it must"
            f" be [{tokens}, {channels}]"
            + (f" or [{channels}]" if edit.spec.source is None else "")
        )


def _check_once(edit: Edit, stand: Standing, last_only: bool, num_layers: int) -> None:
    """A once edit must find its tokens in the forward the session stands in, at or ahead."""
    name = str(location_at(edit.point, num_layers))
    if edit.point < stand.point:
        here = location_at(stand.point, num_layers)
        raise BadEdit(
            f"{name} has passed in forward {stand.forward}, which stands at {here}:"
            f" session.rewind({stand.forward}, {name!r}) goes back there, or make the edit sticky"
            f" to apply from forward {stand.forward + 1}"
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
            raise BadEdit(_elsewhere(missing[0], stand, name))
    if not selected:
        raise BadEdit(_nothing_here(edit.selector, stand, name))
    if not positions:
        raise BadEdit(
            f"logits are edited for the last token only: select token {stand.end - 1} (-1)"
        )
    if edit.spec.kind == "swap" and len(positions) != 2:
        raise BadEdit(
            f"swap takes exactly two tokens, and {len(positions)} are selected"
            f" ({_listed(positions)}): give two positions"
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
    if edit.spec.kind == "mean" and len(positions) == 1:
        notes.append("one token is selected, which is its own mean: nothing changes")
    if _leaves_later_tokens(edit, stand):
        notes.append(f"in forward {stand.forward} only: sticky=True changes later tokens too")
    return "; ".join(notes) or None


def _leaves_later_tokens(edit: Edit, stand: Standing) -> bool:
    """Whether an edit of all tokens, which might be sticky, lasts for one forward of several."""
    value = edit.spec.value
    return (
        not edit.sticky
        and edit.selector.kind == "all"
        and edit.spec.kind in _STEERS
        and stand.forward + 1 < stand.max_new_tokens
        and (value is None or len(value.shape) < 2 or edit.spec.kind == "project_out")
    )


def _elsewhere(position: int, stand: Standing, name: str) -> str:
    holder = stand.forward_of(position)
    here = f"forward {stand.forward} feeds tokens {stand.first} to {stand.end - 1}"
    if stand.first == stand.end - 1:
        here = f"forward {stand.forward} feeds token {stand.first}"
    if holder < stand.forward:
        return (
            f"token {position} was fed in forward {holder}; {here}:"
            f" session.rewind({holder}, {name!r}) goes back there, then edit"
        )
    return (
        f"token {position} is fed in forward {holder}; {here}: stop there, or make the edit sticky"
    )


def _nothing_here(selector: TokenSelector, stand: Standing, name: str) -> str:
    earlier = selector.positions(stand.tokens, 0, stand.first) if stand.first else ()
    if earlier:
        return _elsewhere(earlier[0], stand, name)
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


def _listed(positions: Sequence[int]) -> str:
    shown = ", ".join(map(str, positions[:8]))
    return f"positions {shown}" + (", …" if len(positions) > 8 else "")
