"""Which tokens and channels a selector means. Positions are absolute in the session.

Negative indices and slices count from the end as it is at that forward, so one selector may match
in some forwards and not in others; for a decode the answer costs the same however long the session
is. What follows when nothing matches is decided in `edits` and by the requests that read.
"""

from __future__ import annotations

from collections.abc import Sequence

from kernel_server.protocol.errors import BadSelector
from kernel_server.protocol.messages import Selector

#: Most indices one selector lists.
MAX_INDICES = 1 << 20
_KINDS = ("all", "prompt", "generated", "indices", "slice", "text")


class TokenSelector:
    """A selector of tokens, compiled for one session."""

    def __init__(self, selector: Selector, num_prompt_tokens: int) -> None:
        _check_form(selector, "token")
        if selector.kind == "text" and not selector.token_ids:
            raise BadSelector(f"no token of this model has the text {selector.text!r}")
        self.selector = selector
        self.kind = selector.kind
        self._num_prompt = num_prompt_tokens
        self._indices = frozenset(selector.indices)
        self._slice = slice(selector.start, selector.stop, selector.step)
        self._token_ids = frozenset(selector.token_ids)

    def matches(self, position: int, end: int, token_id: int | None) -> bool:
        """Whether the token at `position` is meant when the session has `end` tokens.

        token_id: None when it is not known yet; a text may then match.
        """
        match self.kind:
            case "all":
                return True
            case "prompt":
                return position < self._num_prompt
            case "generated":
                return position >= self._num_prompt
            case "indices":
                return position in self._indices or position - end in self._indices
            case "slice":
                return position in range(*self._slice.indices(end))
        return token_id is None or token_id in self._token_ids

    def positions(self, tokens: Sequence[int], first: int, end: int) -> tuple[int, ...]:
        """The tokens meant among positions `first` to `end`, in the order the selector names them.

        tokens: ids of the session's first `end` tokens, or more.
        """
        if end - first == 1:
            return (first,) if self.matches(first, end, tokens[first]) else ()
        match self.kind:
            case "all":
                return tuple(range(first, end))
            case "prompt":
                return tuple(range(first, min(end, self._num_prompt)))
            case "generated":
                return tuple(range(max(first, self._num_prompt), end))
            case "indices":
                absolute = (i + end if i < 0 else i for i in self.selector.indices)
                return tuple(dict.fromkeys(i for i in absolute if first <= i < end))
            case "slice":
                return tuple(i for i in range(*self._slice.indices(end)) if i >= first)
        return tuple(i for i in range(first, end) if tokens[i] in self._token_ids)

    def check_once(self, end: int, limit: int) -> None:
        """Refuse indices that are no position of the session, or name one token twice.

        end: tokens the session has. limit: tokens it can have.
        """
        if self.kind != "indices":
            return
        seen: dict[int, int] = {}
        for index in self.selector.indices:
            if not -end <= index < limit:
                raise BadSelector(
                    f"token {index} lies outside the session: it has {end} tokens, 0 to {end - 1}"
                    f" or -{end} to -1"
                )
            position = index + end if index < 0 else index
            if position in seen:
                other = seen[position]
                raise BadSelector(
                    f"token {position} is listed twice"
                    + (f" (as {other} and {index})" if other != index else "")
                )
            seen[position] = index

    def __str__(self) -> str:
        return describe(self.selector)


def resolve_elements(
    heads: Selector, channels: Selector, layout: tuple[int | None, int]
) -> tuple[int, ...] | None:
    """The elements of a token's vector that are meant, in the order named, None for all.

    layout: heads of the tensor (None without) and channels of each. A tensor with heads is
    flattened: element `head * width + channel`. Raises `BadSelector`.
    """
    count, width = layout
    chosen = resolve_indexes(channels, width, "channel")
    if count is None:
        if heads.kind != "all":
            raise BadSelector(
                "this tensor has no heads: leave heads out, or stop at attention.q, .k, .v,"
                " .pattern or .heads"
            )
        return chosen
    which = resolve_indexes(heads, count, "head")
    if which is None and chosen is None:
        return None
    inside = range(width) if chosen is None else chosen
    return tuple(h * width + c for h in (range(count) if which is None else which) for c in inside)


def count_heads(heads: Selector, layout: tuple[int | None, int]) -> int | None:
    """How many heads are meant, None where the tensor has none."""
    if layout[0] is None:
        return None
    which = resolve_indexes(heads, layout[0], "head")
    return layout[0] if which is None else len(which)


def resolve_indexes(selector: Selector, count: int, what: str) -> tuple[int, ...] | None:
    """Indexes below `count` in the order named, None for all, or `BadSelector`.

    what: what is counted, for messages: `channel` or `head`.
    """
    _check_form(selector, what)
    if selector.kind == "all":
        return None
    if selector.kind == "slice":
        found = tuple(range(*slice(selector.start, selector.stop, selector.step).indices(count)))
        if not found:
            raise BadSelector(f"{what}s {describe(selector)} select none of {count} {what}s")
        return found
    if selector.kind != "indices":
        raise BadSelector(
            f"{what}s are selected by index or slice, not by {selector.kind!r}; the tensor has"
            f" {count}"
        )
    for index in selector.indices:
        if not -count <= index < count:
            raise BadSelector(f"{what} {index} lies outside the tensor's {count} {what}s")
    absolute: dict[int, None] = {}
    for index in selector.indices:
        if index % count in absolute:
            raise BadSelector(f"{what} {index % count} is listed twice")
        absolute[index % count] = None
    return tuple(absolute)


def describe(selector: Selector) -> str:
    """A selector as one would write it."""
    if selector.kind == "indices":
        shown = ", ".join(map(str, selector.indices[:8]))
        more = len(selector.indices) - 8
        return shown + (f", … {more} more" if more > 0 else "")
    if selector.kind == "slice":
        parts = [selector.start, selector.stop]
        parts += [] if selector.step is None else [selector.step]
        return ":".join("" if part is None else str(part) for part in parts)
    return repr(selector.text) if selector.kind == "text" else selector.kind


def _check_form(selector: Selector, what: str) -> None:
    if selector.kind not in _KINDS:
        raise BadSelector(f"{what} selector {selector.kind!r} is not one of {', '.join(_KINDS)}")
    if selector.kind == "indices":
        if not selector.indices:
            raise BadSelector(f"the {what} selector lists no index, so it selects nothing")
        if len(selector.indices) > MAX_INDICES:
            raise BadSelector(
                f"the {what} selector lists {len(selector.indices)} indices, more than"
                f" {MAX_INDICES}"
            )
    if selector.kind == "slice" and selector.step == 0:
        raise BadSelector(f"the {what} slice {describe(selector)} has step 0")
