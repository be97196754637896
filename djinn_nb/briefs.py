"""From what the server says to what the views show: messages in, briefs of a snapshot out.

Pure functions. What is asked of the server, and when, is decided in `workbench`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from djinn_nb.current import Pending
from djinn_nb.handles import edit_line
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import (
    AccessDenied,
    ConnectionFailed,
    DjinnError,
    ModelLoading,
    NoServer,
    NotStopped,
    RequestError,
    StaleStop,
    UnknownLocation,
    UnknownSession,
)
from kernel_server.protocol.location import parse_location
from kernel_server.protocol.snapshot import (
    BreakpointBrief,
    EditBrief,
    MemoryBrief,
    MemoryRow,
    ModelBrief,
    NodeBrief,
    Notice,
    PendingBrief,
    SessionBrief,
    SwapBrief,
    Tier,
)

#: Rows of the server's memory that lie on the device; the pools of the other tiers say so in
#: their names, and sums are left out.
_ON_DEVICE = (
    "weights", "KV pages in use", "KV pages free", "activations", "kept stops", "workspace",
    "torch's cache", "rest of the device",
)  # fmt: skip
_SUMS = ("device used", "device free", "host process", "never written")

#: error -> what to do, where the error's own line does not say it
_ADVICE: tuple[tuple[type[DjinnError], str], ...] = (
    (StaleStop, "Look again: it shows where the session stands now, and goes on from there."),
    (UnknownSession, "Choose a session in the list, or launch one."),
    (AccessDenied, "Connect again with its token: %djinn_connect ADDRESS --token TOKEN."),
    (ModelLoading, "Wait until the model is loaded; its progress is shown."),
    (NoServer, "Start it, or connect without an address for a server on this machine."),
    (ConnectionFailed, "It is tried again by itself; look whether the server runs."),
    (NotStopped, "Pause the session, or wait until it stops."),
    (RequestError, "Nothing was changed."),
)


def model_brief(info: m.ModelInfo) -> ModelBrief:
    """The model, as a ladder needs it."""
    sites = tuple(layout.site for layout in info.sites[0]) if info.sites else ()
    heads = {
        layout.heads for layer in info.sites for layout in layer if layout.site == "attention.heads"
    }
    return ModelBrief(
        name=info.name,
        num_layers=info.num_layers,
        hidden_size=info.hidden_size,
        num_heads=heads.pop() if len(heads) == 1 else None,
        dtype=info.dtype,
        device=info.device,
        sites=sites,
        has_tokenizer=info.has_tokenizer,
        random_weights=info.random_weights,
    )


def layer_at(location: str | None, num_layers: int) -> int | None:
    """The layer of a location; None outside the layers."""
    if location is None:
        return None
    try:
        return parse_location(location, num_layers).layer
    except UnknownLocation:
        return None


def session_brief(info: m.SessionInfo, num_layers: int, *, taken_over: bool) -> SessionBrief:
    """A session as a list shows it."""
    return SessionBrief(
        id=info.id,
        name=info.name,
        owner=info.owner,
        status=info.status,
        reason=None if info.stop is None else info.stop.reason,
        location=info.location,
        layer=layer_at(info.location, num_layers),
        forward=info.forward,
        num_tokens=len(info.tokens),
        num_prompt_tokens=info.num_prompt_tokens,
        max_new_tokens=info.max_new_tokens,
        stop_number=info.stop_number,
        layers_executed=info.layers_executed,
        kv_bytes=info.kv_bytes,
        tier=_tier(info),
        pinned=info.pinned,
        parent=info.parent,
        error=None if info.error is None else info.error.message,
        taken_over=taken_over,
    )


def _tier(info: m.SessionInfo) -> Tier:
    """The fastest tier that holds all of the session's pages."""
    if not info.num_pages:
        return "none"
    held: tuple[tuple[Tier, int], ...] = (
        ("device", info.device_pages), ("host", info.host_pages), ("disk", info.disk_pages),
    )  # fmt: skip
    return next((tier for tier, pages in held if pages >= info.num_pages), "mixed")


def breakpoint_briefs(
    points: Iterable[m.BreakpointInfo], num_layers: int
) -> tuple[BreakpointBrief, ...]:
    """The breakpoints of a session."""
    return tuple(
        BreakpointBrief(
            id=point.id,
            location=point.location,
            num_locations=max(1, len(point.locations)),
            layer=layer_at(point.location, num_layers),
            kind=point.kind,
            when=point.when,
            condition=point.condition,
            enabled=point.enabled,
            hits=point.hits,
            stops=point.stops,
        )
        for point in points
    )


def pending_briefs(pending: Iterable[Pending], num_layers: int) -> tuple[PendingBrief, ...]:
    """Breakpoints of runs that follow; num_layers 0: nothing is known of the model."""
    return tuple(
        PendingBrief(
            location=one.location,
            layer=layer_at(one.location, num_layers) if num_layers else None,
            when=one.when,  # type: ignore[arg-type]
            condition=one.condition,
        )
        for one in pending
    )


def edit_briefs(edits: Iterable[m.EditInfo]) -> tuple[EditBrief, ...]:
    """The edits of a session."""
    return tuple(
        EditBrief(
            id=edit.id,
            kind=edit.kind,
            location=edit.location,
            text=edit_line(edit),
            sticky=edit.sticky,
            enabled=edit.enabled,
            at_this_stop=edit.at_this_stop,
        )
        for edit in edits
    )


def node_briefs(nodes: Iterable[m.NodeInfo]) -> tuple[NodeBrief, ...]:
    """The branch tree of a session."""
    return tuple(
        NodeBrief(
            number=node.number,
            parent=node.parent,
            location=node.location,
            forward=node.forward,
            reason=node.reason,
            status=node.status,
            current=node.current,
            kept=node.kept,
            num_tokens=node.num_tokens,
            num_edits=node.num_edits,
        )
        for node in nodes
    )


def memory_brief(
    rows: Sequence[tuple[str, int, str]], swaps: Sequence[SwapBrief] = ()
) -> MemoryBrief:
    """KV pages by tier, and every row that is no sum of others."""
    by_kind = {kind: nbytes for kind, nbytes, _ in rows}

    def used_and_total(suffix: str) -> tuple[int, int]:
        used = by_kind.get(f"KV pages in use{suffix}", 0)
        return used, used + by_kind.get(f"KV pages free{suffix}", 0)

    device, host, disk = map(used_and_total, ("", " (host)", " (disk)"))
    return MemoryBrief(
        device_used=device[0],
        device_total=device[1],
        host_used=host[0],
        host_total=host[1],
        disk_used=disk[0],
        disk_total=disk[1],
        rows=tuple(
            MemoryRow(kind=kind, tier=_row_tier(kind), nbytes=nbytes, note=note)
            for kind, nbytes, note in rows
            if kind not in _SUMS
        ),
        swaps=tuple(swaps),
    )


def _row_tier(kind: str) -> Literal["device", "host", "disk"]:
    if kind in _ON_DEVICE:
        return "device"
    return "disk" if kind.endswith("(disk)") else "host"


def notice_of(error: BaseException) -> Notice:
    """An error as a notice: its line says what happened, the advice what to do."""
    if not isinstance(error, DjinnError):
        return Notice(
            level="error",
            code=type(error).__name__,
            text=f"{type(error).__name__}: {error}".splitlines()[0],
            advice="This is a fault of ours: please report it.",
        )
    advice = next((text for kind, text in _ADVICE if isinstance(error, kind)), "")
    return Notice(level="error", code=error.code, text=error.message, advice=advice)


# -- bad states, as data: what happened, and what to do -----------------------------------------


def leases(events: Sequence[m.Event]) -> Notice | None:
    """The newest of what a server tells of leases, and how many others there are."""
    if not events:
        return None
    newest, others = events[-1], len(events) - 1
    text, _, advice = newest.text.partition("; ")
    more = f" (and {others} more: server.sessions() lists them)" if others else ""
    rests = newest.session is not None and newest.session.dormant
    return Notice(
        level="info" if rests else "warning",
        code="Lease",
        text=text + more,
        advice=f"{advice[:1].upper()}{advice[1:]}.",
    )


def not_connected() -> Notice:
    """No server yet."""
    return Notice(
        level="info",
        code="NotConnected",
        text="not connected to a server",
        advice="Press Connect, or run %djinn_connect: without an address it is the server of this"
        " machine, started where there is none.",
    )


def lost(address: str, error: BaseException) -> Notice:
    """The connection broke; what is shown is from before."""
    denied = isinstance(error, AccessDenied)
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if denied:
        return Notice(
            level="error",
            code="AccessDenied",
            text=f"{address} refuses the access token: {text}",
            advice="Connect again with its token: token=…, or $DJINN_TOKEN.",
        )
    return Notice(
        level="error",
        code="ConnectionLost",
        text=f"The connection to {address} is lost ({text}). Shown is what was last known.",
        advice="It is tried again by itself, and sessions live on in the server. If the server has"
        " ended, start it, or connect to another.",
    )


def replaced(session_id: str, address: str) -> Notice:
    """Another server answers where the session's was."""
    return Notice(
        level="warning",
        code="ServerReplaced",
        text=f"The server of session {session_id} has ended; {address} is another one now.",
        advice="Choose a session in the list, or launch one.",
    )


def ended(session_id: str, *, here: bool) -> Notice:
    """The current session is no more."""
    return Notice(
        level="info" if here else "warning",
        code="Terminated",
        text=f"Session {session_id} was terminated{'' if here else ' by another client'}.",
        advice="Choose another session in the list, or launch one.",
    )


def taken_over(info: m.SessionInfo) -> Notice:
    """Another client has moved the current session."""
    where = f"is stopped at {info.location}" if info.status == "stopped" else f"is {info.status}"
    return Notice(
        level="warning",
        code="TakenOver",
        text=f"Session {info.id} was moved by another client: it {where}, forward {info.forward}.",
        advice="Look again, to go on from there; until then nothing here moves it.",
    )


def failed(info: m.SessionInfo) -> Notice:
    """The current session failed."""
    why = info.error.message if info.error is not None else "the model failed"
    return Notice(
        level="error",
        code="SessionFailed",
        text=f"Session {info.id} failed: {why}",
        advice="session.story() tells what led to it; terminate it, or choose another session.",
    )
