"""The panel of memory: what each tier holds, by kind, and the pages that moved."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

import ipywidgets as widgets

from djinn_nb.cards import MUTED
from djinn_nb.panels.base import Panel, table
from djinn_nb.panels.memory_model import bars_html, size_text, timeline_svg
from kernel_server.protocol.snapshot import Snapshot

#: Swaps listed.
MOST_SWAPS = 8


class MemoryPanel(Panel):
    """Device, host and disk by kind, the timeline of swaps, and the newest ones in words."""

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
                size_text(swap.nbytes) if swap.nbytes else "–",
                swap.text,
            )
            for swap in reversed(memory.swaps[-MOST_SWAPS:])
        ]
        device = "" if shown.model is None else shown.model.device
        return (
            bars_html(memory, device)
            + timeline_svg(memory.swaps)
            + table(
                ("time", "session", "size", "what happened"),
                swaps,
                "no pages have moved between tiers",
                "swaps, the newest first",
            )
            + f"<details><summary style='{MUTED}'>by kind, in numbers</summary>"
            + table(("what", "tier", "size", "note"), kinds, "", "by kind")
            + "</details>"
        )
