"""Breakpoints that did nothing in a run that is over, and why: told without being asked."""

from __future__ import annotations

from kernel_server.protocol import messages as m


def missed_lines(info: m.SessionInfo) -> list[str]:
    """A line for each breakpoint of a finished session that was never reached, or never held.

    One that was switched off is not meant to do anything, and is left out.
    """
    return [
        f"{point.kind} {point.id} ({_place(point)}) {why}"
        for point in info.breakpoints
        if point.enabled and (why := _why(point, info))
    ]


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
