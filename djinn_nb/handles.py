"""Breakpoints and edits as the user holds them: what is known of one, and what can be done to it.

A handle shows the newest description its session has; the server decides what an action means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import UndoRefused, UnknownEdit
from kernel_server.protocol.location import INNER_SITES

if TYPE_CHECKING:
    from djinn_nb.session import Session


class Breakpoint:
    """A place where a session stops; made by `session.break_at()` and `session.break_when()`.

    point = session.break_at(20, condition='token == " to"')
    point.disable()
    point.remove()
    """

    def __init__(self, session: Session, info: m.BreakpointInfo) -> None:
        self._session = session
        self._last = info

    @property
    def info(self) -> m.BreakpointInfo:
        """The newest description of it."""
        newest = self._session.newest
        for found in newest.breakpoints:
            if found.id == self._last.id:
                self._last = found
        return self._last

    @property
    def id(self) -> int:
        """Its number in the session, counted from 1."""
        return self._last.id

    @property
    def location(self) -> str:
        """Its location, the first of several."""
        return self._last.location

    @property
    def locations(self) -> list[str]:
        """All its locations, in the order of a forward."""
        return list(self._last.locations)

    @property
    def kind(self) -> str:
        """`breakpoint`, `data breakpoint` or `logpoint`."""
        return self._last.kind

    @property
    def when(self) -> str:
        """`prefill`, `decode` or `any`."""
        return self._last.when

    @property
    def condition(self) -> str | None:
        """The condition as it was written; None without one."""
        return self._last.condition

    @property
    def enabled(self) -> bool:
        """Whether it is switched on: it may stop the session."""
        return self.info.enabled

    @property
    def hits(self) -> int:
        """Times its location was reached while it was enabled, in a forward of its kind."""
        return self._session.refreshed(self).info.hits

    @property
    def stops(self) -> int:
        """Times the session stopped for it."""
        return self._session.refreshed(self).info.stops

    def enable(self) -> None:
        """Let it stop the session again."""
        self._set(True)

    def disable(self) -> None:
        """Keep it in the list and pass it."""
        self._set(False)

    def remove(self) -> None:
        """Take it out of the session's list; raises UnknownBreakpoint when it is gone already."""
        message = m.RemoveBreakpoint(session_id=self._session.id, breakpoint_id=self.id)
        self._session.client.call(message, object)
        self._session.refresh()

    def _set(self, enabled: bool) -> None:
        message = m.EnableBreakpoint(
            session_id=self._session.id, breakpoint_id=self.id, enabled=enabled
        )
        self._last = self._session.client.call(message, m.BreakpointReply).breakpoint
        self._session.refresh()

    def __repr__(self) -> str:
        info = self.info
        known = any(found.id == info.id for found in self._session.newest.breakpoints)
        return breakpoint_line(info) + ("" if known else " · removed")


class Edit:
    """A change to the tensor at a stop; made by `stop.edit()`.

    edit = stop.edit(scale=0.9, tokens=-1)
    edit.elements_changed, edit.norm_before, edit.norm_after
    edit.undo()
    """

    def __init__(self, session: Session, info: m.EditInfo) -> None:
        self._session = session
        self._last = info

    @property
    def info(self) -> m.EditInfo:
        """The newest description of it."""
        for found in self._session.newest.edits:
            if found.id == self._last.id:
                self._last = found
        return self._last

    @property
    def id(self) -> int:
        """Its number in the session, counted from 1."""
        return self._last.id

    @property
    def kind(self) -> str:
        """`scale`, `add`, `set`, `zero`, `clamp`, `project_out`, `mean`, `swap`, `force`, `ban` or
        `replace`; a patch is a `set`, an ablation a `zero` or a `mean`."""
        return self._last.kind

    @property
    def location(self) -> str:
        """The canonical name of where it applies, such as `layers.20.output`."""
        return self._last.location

    @property
    def sticky(self) -> bool:
        """True when it applies in later forwards too, without stopping."""
        return self._last.sticky

    @property
    def enabled(self) -> bool:
        """Whether it is switched on: it may apply."""
        return self.info.enabled

    @property
    def elements_changed(self) -> int | None:
        """Numbers it changed when it was last applied; None before."""
        return self.info.elements_changed

    @property
    def norm_before(self) -> float | None:
        """L2 norm of the elements selected, before it was last applied; of the finite logits for
        `force`, `ban` and `replace`."""
        return self.info.norm_before

    @property
    def norm_after(self) -> float | None:
        """L2 norm of the same elements, after it was last applied."""
        return self.info.norm_after

    @property
    def tokens_matched(self) -> list[int]:
        """Absolute positions it was last applied to."""
        return list(self.info.tokens_matched)

    @property
    def forwards_matched(self) -> int:
        """Forwards in which a sticky edit found tokens to change."""
        return self._session.refreshed(self).info.forwards_matched

    @property
    def forwards_unmatched(self) -> int:
        """Forwards in which a sticky edit found none."""
        return self._session.refreshed(self).info.forwards_unmatched

    @property
    def note(self) -> str | None:
        """What the server found worth saying, such as a text that selected several tokens."""
        return self.info.note

    def enable(self) -> None:
        """Apply it again: at its own stop exactly, otherwise from its next forward on."""
        self._set(True)

    def disable(self) -> None:
        """Switch it off: at its own stop exactly, otherwise from its next forward on."""
        self._set(False)

    def remove(self) -> None:
        """Take it out of the list. Raises UndoRefused when what it did cannot be taken back."""
        message = m.RemoveEdit(session_id=self._session.id, edit_id=self.id)
        self._session.edit_call(message)

    def undo(self) -> None:
        """Make the value as if this edit had never been; possible at its own stop only.

        Raises UndoRefused once the session has moved on, UnknownEdit when it is gone.
        """
        self._session.refresh()
        if not any(found.id == self.id for found in self._session.newest.edits):
            raise UnknownEdit(f"edit {self.id} is no longer in the list of {self._session.id}")
        if not self.info.at_this_stop:
            move = "disable() it for the forwards to come, or " if self.sticky else ""
            raise UndoRefused(
                f"edit {self.id} was made at a stop that {self._session.id} has left, so undoing"
                f" it would not be exact: {move}launch anew"
            )
        self.remove()

    def _set(self, enabled: bool) -> None:
        message = m.EnableEdit(session_id=self._session.id, edit_id=self.id, enabled=enabled)
        self._session.edit_call(message)

    def __repr__(self) -> str:
        info = self.info
        known = any(found.id == info.id for found in self._session.newest.edits)
        return edit_line(info) + ("" if known else " · removed")


def breakpoint_line(info: m.BreakpointInfo) -> str:
    """A breakpoint, data breakpoint or logpoint in one line."""
    count = len(info.locations)
    place = info.location if count <= 1 else f"{count} locations from {info.location}"
    parts = [f"{info.kind} {info.id}: {place}"]
    if info.when != "any":
        parts.append(f"in {info.when}")
    if info.condition:
        parts.append(f"if {info.condition}")
    if info.ignore:
        parts.append(f"ignoring the first {info.ignore}")
    if info.once:
        parts.append("once")
    if not info.enabled:
        parts.append("disabled")
    hits = "1 hit" if info.hits == 1 else f"{info.hits} hits"
    if info.kind == "logpoint":
        records = "1 record" if info.records == 1 else f"{info.records} records"
        lost = f", {info.dropped} lost: the log is full" if info.dropped else ""
        parts.append(f"notes the {info.what}")
        room = f"{info.log_bytes} of {info.max_bytes} bytes"
        return f"{', '.join(parts)} · {hits}, {records}, {room}{lost}"
    stops = "1 stop" if info.stops == 1 else f"{info.stops} stops"
    return f"{', '.join(parts)} · {hits}, {stops}"


def edit_line(info: m.EditInfo) -> str:
    """An edit in one line, with what it changed."""
    parts = [f"edit {info.id}: {info.description}"]
    if info.elements_changed is not None:
        numbers = "1 number" if info.elements_changed == 1 else f"{info.elements_changed} numbers"
        parts.append(f"{numbers} changed" + ": it does nothing" * (not info.elements_changed))
    if info.norm_before is not None and info.norm_after is not None:
        parts.append(f"norm {info.norm_before:.4g} → {info.norm_after:.4g}")
    if info.sticky:
        forwards = (
            "1 forward" if info.forwards_matched == 1 else f"{info.forwards_matched} forwards"
        )
        parts.append(f"sticky, matched in {forwards}, not in {info.forwards_unmatched}")
    if not info.enabled:
        parts.append("disabled")
    elif layer := _replayed(info.location):
        parts.append(f"layer {layer} runs by the replay path")
    if info.note:
        parts.append(info.note)
    return " · ".join(parts)


def _replayed(location: str) -> str:
    """The layer that an edit inside it has run with its sites open; empty for other places."""
    _, _, place = location.partition("layers.")
    layer, _, site = place.partition(".")
    return layer if site in INNER_SITES else ""
