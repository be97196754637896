"""The Python of what was done last, below each panel: to be copied, or put in a cell."""

from __future__ import annotations

from functools import cache
from typing import Any

import anywidget
import traitlets

from djinn_nb import briefs, verbs
from djinn_nb.panels.scripts import script, style
from djinn_nb.workbench import Workbench
from kernel_server.protocol.errors import BadArgument, DjinnError
from kernel_server.protocol.snapshot import Snapshot

#: Actions whose code is shown.
MOST = 5


class Actions(anywidget.AnyWidget):
    """The newest actions, each with its code; it also gives its panel a role and a name."""

    actions: Any = traitlets.List().tag(sync=True)
    said = traitlets.Unicode().tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)


@cache
def _widget_class() -> type[Actions]:
    return type("ActionsView", (Actions,), {"_esm": script("actions"), "_css": style()})


class ActionsBar:
    """The widget of one panel, and what its buttons do.

    bar = ActionsBar(bench, "Djinn: sessions")
    bar.draw(bench.snapshot())
    """

    def __init__(self, bench: Workbench, label: str) -> None:
        self._bench = bench
        self.widget = _widget_class()(label=label)
        self.widget.on_msg(lambda _, message, buffers: self.take(message))

    def draw(self, shown: Snapshot) -> None:
        """Show the newest actions, the last one first."""
        newest = [
            {"number": one.number, "code": one.code, "outcome": one.outcome, "error": one.error}
            for one in reversed(shown.actions[-MOST:])
        ]
        if newest != self.widget.actions:
            self.widget.actions = newest
            self.widget.said = ""

    def take(self, message: Any) -> None:
        """Put the code of an action in a cell; says where it went."""
        number = message.get("insert") if isinstance(message, dict) else None
        found = [one for one in self._bench.snapshot().actions if one.number == number]
        try:
            if not found:
                raise BadArgument(f"there is no action {number!r} any more")
            self.widget.said = verbs.insert_cell(self._bench, found[0].code)
        except DjinnError as error:
            self._bench.notify(briefs.notice_of(error))
