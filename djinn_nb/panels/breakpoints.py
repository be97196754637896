"""The panel of breakpoints: set one, switch it, remove it; those of runs to come are listed too."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as widgets

from djinn_nb.panels.base import NONE, Panel, table
from kernel_server.protocol.location import known_names
from kernel_server.protocol.snapshot import Snapshot


def rows_of(shown: Snapshot) -> list[tuple[str, ...]]:
    """A row per breakpoint: id, where, if, when, state, hits, stops."""
    rows: list[tuple[str, ...]] = [
        (
            str(one.id),
            one.location + (f" and {one.num_locations - 1} more" if one.num_locations > 1 else ""),
            one.condition or "",
            one.when,
            one.kind + ("" if one.enabled else " · disabled"),
            str(one.hits),
            str(one.stops),
        )
        for one in shown.breakpoints
    ]
    if not shown.breakpoints:
        rows += [
            ("–", one.location, one.condition or "", one.when, "in runs that follow", "–", "–")
            for one in shown.pending
        ]
    return rows


class BreakpointsPanel(Panel):
    """Breakpoints of the current session, or of the runs that follow."""

    name, title = "breakpoints", "Breakpoints"

    def make(self) -> Sequence[widgets.Widget]:
        self._where = widgets.Combobox(
            placeholder="20 or layers.3.middle", description="Location", ensure_option=False
        )
        self._condition = widgets.Text(placeholder='token == " to" and norm > 30', description="If")
        self._when = widgets.Dropdown(
            options=["any", "prefill", "decode"], description="When",
            layout=widgets.Layout(width="180px"),
        )  # fmt: skip
        self._add = widgets.Button(description="Set", tooltip="Set a breakpoint there")
        self._add.on_click(self._set)
        self._which = widgets.Dropdown(
            description="Which", options=[("none", NONE)], layout=widgets.Layout(width="auto")
        )
        self._switch = widgets.Button(description="Disable", tooltip="Keep it and pass it")
        self._switch.on_click(self._switched)
        self._remove = widgets.Button(description="Remove", tooltip="Take it out of the list")
        self._remove.on_click(lambda _: self._on_chosen("remove_breakpoint"))
        self._sure = widgets.Checkbox(
            description="really:", indent=False, layout=widgets.Layout(width="auto")
        )
        self._clear = widgets.Button(
            description="Remove all", disabled=True, tooltip="Also those of runs that follow"
        )
        self._clear.on_click(self._cleared)
        self._sure.observe(lambda _: self._enable_clear(), "value")
        self._list = widgets.HTML()
        wrap = widgets.Layout(flex_flow="row wrap")
        for one in (self._add, self._switch, self._remove, self._clear):
            one.layout.width = "auto"
        return [
            widgets.HBox([self._where, self._condition, self._when, self._add], layout=wrap),
            widgets.HBox(
                [self._which, self._switch, self._remove, self._sure, self._clear], layout=wrap
            ),
            self._list,
        ]

    def _set(self, _: object) -> None:
        text = self._where.value.strip()
        self.perform(
            "set_breakpoint",
            location=int(text) if text.isdigit() else text,
            condition=self._condition.value or None,
            when=self._when.value,
        )

    def _switched(self, _: object) -> None:
        enabled = self._enabled.get(self._which.value, True)
        self._on_chosen("enable_breakpoint", enabled=not enabled)

    def _on_chosen(self, verb: str, **given: object) -> None:
        if self._which.value != NONE:
            self.perform(verb, id=self._which.value, **given)

    def _cleared(self, _: object) -> None:
        self._sure.value = False
        self.perform("clear_breakpoints")

    def _enable_clear(self) -> None:
        shown = self.bench.snapshot()
        self._clear.disabled = not (self._sure.value and (shown.breakpoints or shown.pending))

    def draw(self, shown: Snapshot) -> None:
        if shown.model is not None and not self._where.options:
            names = known_names(shown.model.num_layers, shown.model.sites[:-1])
            self._where.options = tuple(names)
        self._enabled = {one.id: one.enabled for one in shown.breakpoints}
        options = [("none", NONE), *((f"{p.id} {p.location}", p.id) for p in shown.breakpoints)]
        if tuple(options) != tuple(self._which.options):
            chosen = self._which.value
            self._which.options = options
            self._which.value = chosen if chosen in self._enabled else NONE
        on = self._enabled.get(self._which.value, True)
        self._switch.description = "Disable" if on else "Enable"
        self._switch.disabled = "enable_breakpoint" not in shown.can or not shown.breakpoints
        self._remove.disabled = self._switch.disabled
        self._enable_clear()
        self._list.value = self.html(shown)

    def html(self, shown: Snapshot) -> str:
        return table(
            ("id", "location", "if", "when", "kind", "hits", "stops"),
            rows_of(shown),
            "no breakpoint: name a location and press Set, or run %djinn_break 20",
            "hits: times the location was reached · stops: times the session stopped there",
        )
