"""Breakpoints and edits that did not do what they are for in a run that is over: told unasked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kernel_server.protocol import messages as m

#: Lines that a list of sessions shows.
_MOST = 6


def missed_lines(info: m.SessionInfo) -> list[str]:
    """What a finished session has to say of its breakpoints and edits, a line each.

    Breakpoints never reached or never held; edits that found no token, changed nothing, or carry a
    note. What was switched off is not meant to do anything, and is left out.
    """
    points = [
        f"{point.kind} {point.id} ({_place(point)}) {why}"
        for point in info.breakpoints
        if point.enabled and (why := _why(point, info))
    ]
    edits = [
        f"edit {edit.id} ({edit.description}) {why}"
        for edit in info.edits
        if edit.enabled and (why := _why_edit(edit))
    ]
    return points + edits


def missed_by_all(infos: Iterable[m.SessionInfo]) -> list[str]:
    """The same of several sessions: each line once, with how many of them it is said of."""
    infos = list(infos)
    counts = Counter(line for info in infos for line in missed_lines(info))
    lines = [
        f"{line} (in {count} of {len(infos)})" if len(infos) > 1 else line
        for line, count in counts.most_common(_MOST)
    ]
    more = len(counts) - _MOST
    return lines + ([f"… {more} more, by session"] if more > 0 else [])


def _place(point: m.BreakpointInfo) -> str:
    count = len(point.locations)
    return point.location if count <= 1 else f"{count} locations from {point.location}"


def _why(point: m.BreakpointInfo, info: m.SessionInfo) -> str:
    """What it missed; empty when it did what it is for."""
    did = "noted" if point.kind == "logpoint" else "stopped"
    if not point.hits:
        decodes = len(info.tokens) - info.num_prompt_tokens - 1
        if point.when == "decode" and decodes <= 0:
            return "was never reached: there was no decode, the prefill drew the only token"
        kind = "" if point.when == "any" else f"{point.when} "
        return f"was never reached: no {kind}forward came there after it was set"
    hits = "1 hit" if point.hits == 1 else f"{point.hits} hits"
    if not point.held:
        if point.condition is None:
            return f"{did} nothing: none of its tokens were fed in {hits}"
        return f"never held in {hits}: {point.condition}"
    if point.kind != "logpoint" and not point.stops:
        held = "once" if point.held == 1 else f"{point.held} times"
        return f"held {held} and never stopped: it ignores the first {point.ignore}"
    return ""


def _why_edit(edit: m.EditInfo) -> str:
    """What an edit missed; empty when it did what it is for."""
    if not edit.forwards_matched:
        forwards = (
            "1 forward" if edit.forwards_unmatched == 1 else f"{edit.forwards_unmatched} forwards"
        )
        if edit.forwards_unmatched:
            return f"never applied: {forwards} came there and fed none of its tokens"
        return "never applied: no forward came there after it was made"
    if edit.elements_changed == 0:
        return f"changed nothing: no number differs{f'; {edit.note}' if edit.note else ''}"
    return f"applied: {edit.note}" if edit.note is not None else ""
