"""The panel of memory: what each tier holds, by kind, and the pages that moved last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

import ipywidgets as widgets

from djinn_nb.cards import MUTED
from djinn_nb.panels.base import Panel, table
from kernel_server.protocol.snapshot import MemoryBrief, Snapshot

#: Swaps listed.
MOST_SWAPS = 8


def size_text(nbytes: int) -> str:
    """Bytes for people.

    >>> size_text(3 * 2**20), size_text(5 * 2**30)
    ('3.0 MiB', '5.0 GiB')
    """
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"


def bars_html(memory: MemoryBrief) -> str:
    """A bar per tier: KV pages in use of those there are."""
    tiers = (
        ("device", memory.device_used, memory.device_total),
        ("host", memory.host_used, memory.host_total),
        ("disk", memory.disk_used, memory.disk_total),
    )
    lines = []
    for name, used, total in tiers:
        if not total:
            lines.append(f"<div style='{MUTED}'>{name}: no such tier on this server</div>")
            continue
        share = used / total
        text = f"{name}: KV {size_text(used)} of {size_text(total)}"
        lines.append(
            f"<div>{text}<div role='img' aria-label='{text}, {share:.0%}' style='height:9px;"
            "max-width:420px;border:1px solid currentColor'><div style='height:100%;"
            f"width:{100 * share:.1f}%;background:currentColor;opacity:.55'></div></div></div>"
        )
    return "".join(lines)


class MemoryPanel(Panel):
    """Device, host and disk by kind, and the newest swaps."""

    name, title = "memory", "Memory"

    def make(self) -> Sequence[widgets.Widget]:
        self._all = widgets.HTML()
        return [self._all]

    def draw(self, shown: Snapshot) -> None:
        self._all.value = self.html(shown)

    def html(self, shown: Snapshot) -> str:
        memory = shown.memory
        if memory is None:
            text = "nothing is known of the memory yet: connect to a server"
            return f"<div style='{MUTED}'>{escape(text)}</div>"
        kinds = [
            (row.kind, row.tier, size_text(row.nbytes), row.note)
            for row in memory.rows
            if row.nbytes
        ]
        swaps = [
            (
                time.strftime("%H:%M:%S", time.localtime(swap.time_s)),
                swap.session_id,
                size_text(swap.nbytes),
                swap.text,
            )
            for swap in reversed(memory.swaps[-MOST_SWAPS:])
        ]
        return (
            bars_html(memory)
            + table(("what", "tier", "size", "note"), kinds, "", "by kind")
            + table(
                ("time", "session", "size", "what happened"),
                swaps,
                "no pages have moved between tiers",
                "swaps, the newest first",
            )
        )
