"""Memory as it is drawn: a bar per tier, stacked by kind, and a timeline of swaps.

Every colour is named in the legend beside its size; marks are lines with words. Nothing here asks
the server, and nothing is a widget.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from kernel_server.protocol.snapshot import MemoryBrief, MemoryRow, SwapBrief

#: Okabe and Ito's palette, which colour-blind readers tell apart; in the order of the kinds.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F")
#: What is free is no colour: it shows the page.
FREE = "transparent"
#: Kinds that have their colour in every tier; others take what is left, in the order met.
_KNOWN = ("KV pages in use", "weights", "activations", "kept stops", "workspace")
_GREY = "#7F7F7F"
TIERS = ("device", "host", "disk")
_FREE_KINDS = ("KV pages free",)
_WAY = re.compile(r"(device|host|disk) to (device|host|disk)")


@dataclass(frozen=True, slots=True)
class Part:
    """A kind's part of a bar: bytes, and its colour."""

    kind: str
    nbytes: int
    colour: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A tier: its parts in order, and the KV pages in use of those there are, bytes."""

    tier: str
    parts: tuple[Part, ...]
    kv_used: int
    kv_total: int

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)


def size_text(nbytes: float) -> str:
    """Bytes for people.

    >>> size_text(3 * 2**20), size_text(5 * 2**30)
    ('3.0 MiB', '5.0 GiB')
    """
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} B"


def bars_of(memory: MemoryBrief) -> list[Bar]:
    """A bar for each tier that the server has: KV pages first, then the other kinds by size."""
    totals = {
        "device": (memory.device_used, memory.device_total),
        "host": (memory.host_used, memory.host_total),
        "disk": (memory.disk_used, memory.disk_total),
    }
    colours = _colours(memory)
    bars = []
    for tier in TIERS:
        rows = [row for row in memory.rows if row.tier == tier and row.nbytes > 0]
        if not rows:
            continue
        rows.sort(key=_order)
        parts = [Part(row.kind, row.nbytes, colours[_name(row)]) for row in rows]
        bars.append(Bar(tier, tuple(parts), *totals[tier]))
    return bars


def _colours(memory: MemoryBrief) -> dict[str, str]:
    """Kind -> its colour: one kind is one colour in every tier."""
    names = [_name(row) for row in memory.rows if row.nbytes > 0]
    free = [_name(row) for row in memory.rows if _is_free(row)]
    rest = [name for name in names if name.startswith("rest ")]
    left = [name for name in dict.fromkeys(names) if name not in (*_KNOWN, *free, *rest)]
    colours = dict(zip(_KNOWN, PALETTE, strict=False))
    spare = [one for one in PALETTE[len(_KNOWN) :] if one != _GREY]
    colours |= {name: spare[i % len(spare)] for i, name in enumerate(left)}
    return colours | dict.fromkeys(rest, _GREY) | dict.fromkeys(free, FREE)


def _name(row: MemoryRow) -> str:
    """The kind without its tier."""
    return row.kind.removesuffix(f" ({row.tier})")


def _order(row: MemoryRow) -> tuple[int, int]:
    if row.kind.startswith("KV pages"):
        return (1 if _is_free(row) else 0, 0)
    return 2, -row.nbytes


def _is_free(row: MemoryRow) -> bool:
    return row.kind.startswith(_FREE_KINDS)


# -- drawing ------------------------------------------------------------------------------------


def bars_html(memory: MemoryBrief, device: str = "") -> str:
    """The bars with their legends, and what each tier has of KV pages. device: its name."""
    bars = bars_of(memory)
    missing = [tier for tier in TIERS if tier not in {bar.tier for bar in bars}]
    found = "".join(_bar_html(bar, device if bar.tier == "device" else "") for bar in bars)
    if missing:
        names = " and ".join(missing)
        found += f"<div style='opacity:.75'>{names}: no such tier on this server</div>"
    return found


def _bar_html(bar: Bar, device: str) -> str:
    name = f"{bar.tier} ({device})" if device else bar.tier
    head = f"{name}: {size_text(bar.nbytes)}"
    if bar.kv_total:
        head = f"{name}: KV {size_text(bar.kv_used)} of {size_text(bar.kv_total)}"
    described = ", ".join(f"{part.kind} {size_text(part.nbytes)}" for part in bar.parts)
    budget = _budget_at(bar)
    mark = ""
    if budget is not None:
        mark = (
            f"<div style='position:relative;height:14px;font-size:11px'><span style='position:"
            f"absolute;left:{100 * budget:.2f}%;border-left:2px solid currentColor;height:14px;"
            f"padding-left:3px;white-space:nowrap{_keep_inside(budget)}'>KV budget</span></div>"
        )
    legend = "".join(_legend_html(part, bar.nbytes) for part in bar.parts)
    return (
        f"<div style='margin:6px 0 10px'><div><b>{escape(head)}</b></div>"
        f"<div role='img' aria-label='{escape(f'{name}: {described}', quote=True)}' style='display:"
        "flex;height:16px;max-width:760px;border:1px solid currentColor'>"
        f"{''.join(_part_html(part, bar.nbytes) for part in bar.parts)}</div>"
        f"<div style='max-width:760px'>{mark}</div>"
        "<div style='display:flex;flex-wrap:wrap;gap:0 14px;font-size:12px;max-width:760px'>"
        f"{legend}</div></div>"
    )


def _keep_inside(share: float) -> str:
    """A mark near the right end has its words to the left."""
    if share <= 0.85:
        return ""
    return (
        ";border-left:0;padding-left:0;border-right:2px solid currentColor;padding-right:3px;"
        "transform:translateX(-100%)"
    )


def _budget_at(bar: Bar) -> float | None:
    """Where the KV pages end, as a share of the bar; None where they are all of it."""
    if not bar.kv_total or not bar.nbytes or bar.kv_total >= bar.nbytes:
        return None
    return bar.kv_total / bar.nbytes


def _part_html(part: Part, whole: int) -> str:
    title = escape(f"{part.kind}: {size_text(part.nbytes)}", quote=True)
    return (
        f"<div title='{title}' style='width:{100 * part.nbytes / whole:.3f}%;background:"
        f"{part.colour};border-right:1px solid rgba(128,128,128,.6);box-sizing:border-box'></div>"
    )


def _legend_html(part: Part, whole: int) -> str:
    share = part.nbytes / whole
    return (
        "<span style='white-space:nowrap'><span style='display:inline-block;width:10px;height:10px;"
        f"border:1px solid currentColor;background:{part.colour};margin-right:4px'></span>"
        f"{escape(part.kind)} {size_text(part.nbytes)} ({_share_text(share)})</span>"
    )


def _share_text(share: float) -> str:
    return "under 1%" if 0 < share < 0.01 else f"{share:.0%}"


@dataclass(frozen=True, slots=True)
class Moved:
    """A swap as the timeline draws it; up: towards the device."""

    time_s: float
    nbytes: int
    up: bool
    words: str


def moves_of(swaps: Sequence[SwapBrief]) -> list[Moved]:
    """The swaps that moved bytes, with their direction."""
    found = []
    for swap in swaps:
        way = _WAY.search(swap.text)
        if way is None or not swap.nbytes:
            continue
        up = TIERS.index(way[2]) < TIERS.index(way[1])
        clock = time.strftime("%H:%M:%S", time.localtime(swap.time_s))
        words = f"{clock} session {swap.session_id}: {size_text(swap.nbytes)}, {swap.text}"
        found.append(Moved(swap.time_s, swap.nbytes, up, words))
    return found


#: Of the timeline, pixels.
WIDTH, HALF, LEFT, RIGHT = 760, 46, 70, 10


def timeline_svg(swaps: Sequence[SwapBrief]) -> str:
    """Bytes moved over time: up what came to a faster tier, down what left for a slower one."""
    moves = moves_of(swaps)
    if not moves:
        return ""
    begin, end = moves[0].time_s, moves[-1].time_s
    span, most = max(end - begin, 1.0), max(move.nbytes for move in moves)
    middle, inner = HALF + 14, WIDTH - LEFT - RIGHT - 8
    marks = []
    for move in moves:
        x = LEFT + 4 + inner * (move.time_s - begin) / span
        tall = max(2.0, HALF * move.nbytes / most)
        y = middle - tall if move.up else middle
        colour = PALETTE[0] if move.up else PALETTE[5]
        marks.append(
            f"<rect x='{x - 1.5:.1f}' y='{y:.1f}' width='3' height='{tall:.1f}' fill='{colour}'>"
            f"<title>{escape(move.words)}</title></rect>"
        )
    clocks = [time.strftime("%H:%M:%S", time.localtime(t)) for t in (begin, end)]
    ups, downs = (sum(move.nbytes for move in moves if move.up is up) for up in (True, False))
    label = (
        f"timeline of {len(moves)} swaps from {clocks[0]} to {clocks[1]}: {size_text(ups)} came up,"
        f" {size_text(downs)} went down"
    )
    bottom = middle + HALF
    text = "font-size='11' fill='currentColor'"
    return (
        f"<svg role='img' aria-label='{label}' viewBox='0 0 {WIDTH} {bottom + 20}' style='width:"
        f"100%;max-width:{WIDTH}px;height:auto;display:block;font-family:inherit'>"
        f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{middle}' y2='{middle}'"
        f" stroke='currentColor' stroke-width='1'/>"
        f"<text x='0' y='{middle - HALF + 9}' {text}>{size_text(most)}</text>"
        f"<text x='0' y='{middle + 4}' {text}>0 B</text>"
        f"<text x='0' y='{bottom}' {text}>{size_text(most)}</text>"
        f"{''.join(marks)}"
        f"<text x='{LEFT}' y='{bottom + 16}' {text}>{clocks[0]}</text>"
        f"<text x='{WIDTH - RIGHT}' y='{bottom + 16}' text-anchor='end' {text}>{clocks[1]}</text>"
        "</svg><div style='font-size:12px'>"
        f"<span style='color:{PALETTE[0]}'>▲</span> up: to a faster tier, {size_text(ups)} · "
        f"<span style='color:{PALETTE[5]}'>▼</span> down: to a slower one, {size_text(downs)}"
        "</div>"
    )
