"""The panel of branches: every place where the session stood, as a tree; choose one to go back."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import ipywidgets as widgets

from djinn_nb.cards import MONO, MUTED
from djinn_nb.panels.base import Panel
from kernel_server.protocol.snapshot import NodeBrief, Snapshot

#: A space that is kept.
NBSP = "\N{NO-BREAK SPACE}"


def lines_of(nodes: Sequence[NodeBrief]) -> list[tuple[int, str]]:
    """(number, text) of each node, children below their parent; where it branches, with rails.

    A straight way is not set in: trees are long, not wide. Spaces do not break, since a list of a
    browser takes others together.

    >>> root = NodeBrief(number=0, parent=None, location=None, forward=0, reason=None,
    ...                  status="waiting", current=True, kept=False, num_tokens=3, num_edits=0)
    >>> lines_of([root])
    [(0, '▶\xa00 start, forward 0')]
    """
    children: dict[int | None, list[NodeBrief]] = {}
    known = {node.number for node in nodes}
    for node in nodes:
        parent = node.parent if node.parent in known else None
        children.setdefault(parent, []).append(node)
    lines: list[tuple[int, str]] = []
    # (node, what stands before it, what stands before all that comes after it)
    todo = [(node, "", "") for node in reversed(children.get(None, []))]
    while todo:
        node, here, rails = todo.pop()
        lines.append((node.number, f"{here}{'▶' if node.current else '●'}{NBSP}{_text(node)}"))
        below = children.get(node.number, [])
        if len(below) == 1:
            todo.append((below[0], rails, rails))
            continue
        for i in reversed(range(len(below))):
            last = i == len(below) - 1
            branch, rail = ("└─", 2 * NBSP) if last else ("├─", f"│{NBSP}")
            todo.append((below[i], rails + branch, rails + rail))
    return lines


def _text(node: NodeBrief) -> str:
    place = node.location or ("start" if node.status == "waiting" else node.status)
    reason = f" ({node.reason})" if node.reason else ""
    edits = f", {node.num_edits} edit{'s' * (node.num_edits > 1)}" if node.num_edits else ""
    kept = "" if node.kept or node.location is None else ", to be run again"
    return f"{node.number} {place}{reason}, forward {node.forward}{edits}{kept}"


class BranchesPanel(Panel):
    """The tree of stops and branches of the current session."""

    name, title = "branches", "Branches"

    def make(self) -> Sequence[widgets.Widget]:
        self._nodes = widgets.Select(
            options=[], rows=8, layout=widgets.Layout(width="100%"), description="Nodes"
        )
        self._nodes.add_class("djinn-mono")
        self._go = widgets.Button(description="Go there", tooltip="Return to the node chosen")
        self._go.on_click(lambda _: self._on_chosen("go_to"))
        self._prune = widgets.Button(
            description="Prune", tooltip="Free the node chosen and all that came after it"
        )
        self._prune.on_click(lambda _: self._on_chosen("prune"))
        self._hint = widgets.HTML()
        return [self._nodes, widgets.HBox([self._go, self._prune]), self._hint]

    def _on_chosen(self, verb: str) -> None:
        if self._nodes.value is not None:
            self.perform(verb, node=self._nodes.value)

    def draw(self, shown: Snapshot) -> None:
        options = [(text, number) for number, text in lines_of(shown.branches)]
        if tuple(options) != tuple(self._nodes.options):
            chosen = self._nodes.value
            self._nodes.options = options
            here = next((n.number for n in shown.branches if n.current), None)
            known = {number for _, number in options}
            self._nodes.value = chosen if chosen in known else here
        self._go.disabled = "go_to" not in shown.can
        self._prune.disabled = "prune" not in shown.can
        self._hint.value = _legend(shown)

    def html(self, shown: Snapshot) -> str:
        text = "\n".join(text for _, text in lines_of(shown.branches))
        return f"<pre style='{MONO}'>{escape(text)}</pre>{_legend(shown)}"


def _legend(shown: Snapshot) -> str:
    text = "▶ where the session stands · ├ └ the ways it took from one node"
    if not shown.branches:
        text = "no session has stood anywhere yet: launch a prompt"
    return f"<div style='{MUTED}'>{escape(text)}</div>"
