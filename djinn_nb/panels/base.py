"""What every panel has: a body of widgets, a static form, notices, and the code of what was done.

A panel draws snapshots and sends verbs. Widgets are made when it is first shown; callbacks queue
and return, since the thread that runs them differs from client to client.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from html import escape
from typing import Any, ClassVar

import ipywidgets as widgets

from djinn_nb import briefs, verbs
from djinn_nb.cards import CARD, MUTED
from djinn_nb.panels.actions import ActionsBar
from djinn_nb.workbench import Workbench
from kernel_server.protocol.errors import DjinnError
from kernel_server.protocol.snapshot import Notice, Snapshot

#: A cell of a table may be broken into lines if it has more characters.
MOST_UNBROKEN = 24
#: The value of a choice that is none: a widget shows no text for None.
NONE = -1


class Panel:
    """One panel; the last line of a cell shows it.

    panel("sessions")
    """

    name: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self._rev = -1
        self._body: widgets.VBox | None = None
        self._end: Any = None

    # -- what a panel says of itself ------------------------------------------------------

    def make(self) -> Sequence[widgets.Widget]:
        """Its widgets, made once."""
        raise NotImplementedError

    def draw(self, shown: Snapshot) -> None:
        """Bring the widgets up to date; on the publisher's thread."""
        raise NotImplementedError

    def html(self, shown: Snapshot) -> str:
        """Its static form, for saved notebooks and readers without widgets."""
        raise NotImplementedError

    # -- widgets --------------------------------------------------------------------------

    @property
    def body(self) -> widgets.VBox:
        """The widgets, which follow the workbench from now on."""
        if self._body is None:
            self._notice = widgets.HTML()
            self._code = ActionsBar(self.bench, f"Djinn: {self.name}")
            self.heading = widgets.HTML(
                f"<b role='heading' aria-level='3'>{escape(self.title)}</b>"
            )
            self._body = widgets.VBox([self.heading, self._notice, *self.make(), self._code.widget])
            self._body.add_class("djinn-panel")
            self._end = self.bench.subscribe(self._told)
            self._told(self.bench.snapshot())
        return self._body

    def _told(self, shown: Snapshot) -> None:
        if shown.rev < self._rev:
            return
        self._rev = shown.rev
        self._notice.value = notice_html(state_of(shown))
        self._code.draw(shown)
        self.draw(shown)

    def close(self) -> None:
        """Take the widgets away and follow the workbench no more."""
        if self._end is not None:
            self._end()
            self._end = None
        if self._body is not None:
            self._body.close()
            self._body = None

    def button(self, text: str, verb: str, tooltip: str, **given: Any) -> widgets.Button:
        """A button that performs a verb."""
        made = widgets.Button(
            description=text, tooltip=tooltip, layout=widgets.Layout(width="auto")
        )
        made.on_click(lambda _: self.perform(verb, **given))
        return made

    def perform(self, verb: str, **given: Any) -> None:
        """Have a verb carried out; a refusal is shown as a notice."""
        try:
            verbs.perform(self.bench, verb, **given)
        except DjinnError as error:
            self.bench.notify(briefs.notice_of(error))

    # -- displays -------------------------------------------------------------------------

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        shown = self.bench.snapshot()
        bundle: dict[str, Any] = {}
        with contextlib.suppress(AttributeError, TypeError):
            bundle = dict(self.body._repr_mimebundle_() or {})
        bundle["text/html"] = (
            f"<div role='region' aria-label='Djinn: {escape(self.name)}' style='{CARD}'>"
            f"<b>{escape(self.title)}</b>{notice_html(state_of(shown))}{self.html(shown)}</div>"
        )
        bundle["text/plain"] = f"{self.title}: {one_line(shown)}"
        return bundle


class Panels:
    """Several panels in one layout, an accordion; the first is open."""

    def __init__(self, panels: Sequence[Panel]) -> None:
        self.panels = list(panels)
        self._body: widgets.Accordion | None = None

    @property
    def body(self) -> widgets.Accordion:
        if self._body is None:
            bodies = [one.body for one in self.panels]
            for one in self.panels:
                one.heading.layout.display = "none"  # the accordion's own says it
            self._body = widgets.Accordion(
                children=bodies,
                titles=[one.title for one in self.panels],
                selected_index=0,
            )
        return self._body

    def close(self) -> None:
        """Take them all away."""
        for one in self.panels:
            one.close()
        if self._body is not None:
            self._body.close()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        bundle = dict(self.body._repr_mimebundle_() or {})
        forms = [one._repr_mimebundle_() for one in self.panels]
        bundle["text/html"] = "".join(form["text/html"] for form in forms)
        bundle["text/plain"] = "\n".join(form["text/plain"] for form in forms)
        return bundle


# -- what all panels show alike -------------------------------------------------------------------


def state_of(shown: Snapshot) -> Notice | None:
    """What is to be said first: the notice, or what a state without one asks for."""
    if shown.notice is not None:
        return shown.notice
    if shown.connection == "connecting":
        where = shown.address or "a server"
        return Notice(
            level="info",
            code="Connecting",
            text=f"connecting to {where} …",
            advice="Nothing to do; a first start loads the model, which takes a while.",
        )
    if shown.connection == "loading" and shown.progress is not None:
        done = shown.progress.done
        share = "" if done is None else f" {done:.0%}"
        text = f"loading the model: {shown.progress.text}{share}"
        return Notice(
            level="info",
            code="Loading",
            text=text,
            advice="Nothing to do: it goes on as soon as the model is there.",
        )
    if shown.connection == "none":
        return briefs.not_connected()
    if shown.busy is not None and shown.busy.in_cell:
        return Notice(
            level="info",
            code="InCell",
            text="a cell is running, and what is clicked here waits for it",
            advice=(
                "To stop the session now press Pause in the sidebar; or interrupt the kernel (■),"
                " which leaves the session running, and press Pause here."
            ),
        )
    return None


def notice_html(notice: Notice | None) -> str:
    """A notice; its level is a word too, so that it is not told by colour alone."""
    if notice is None:
        return ""
    role = "alert" if notice.level == "error" else "status"
    sign = {"error": "⚠ error", "warning": "⚠ note", "info": "→"}[notice.level]
    text = f"{notice.text.rstrip('.')}." if notice.advice else notice.text
    advice = f" <span>{escape(notice.advice)}</span>" if notice.advice else ""
    return (
        f"<div role='{role}' style='border-left:3px solid currentColor;padding:2px 8px;margin:4px"
        f" 0'><b>{sign}</b> {escape(text)}{advice}</div>"
    )


def one_line(shown: Snapshot) -> str:
    """Where things stand, in one line."""
    if shown.connection != "ready":
        notice = state_of(shown)
        return notice.text if notice is not None else shown.connection
    session = shown.session
    if session is None:
        return "no session yet: launch a prompt"
    where = f" at {session.location}" if session.location else ""
    return f"session {session.id} {session.status}{where}, forward {session.forward}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str, caption: str) -> str:
    """A table of texts; `empty` says what to do when there is nothing."""
    if not rows:
        return f"<div style='{MUTED}'>{escape(empty)}</div>"
    head = "".join(
        f"<th scope='col' style='text-align:left;padding:1px 10px 1px 0'>{escape(column)}</th>"
        for column in columns
    )
    lines = "".join(
        "<tr>"
        + "".join(
            f"<td style='text-align:left;padding:1px 10px 1px 0;vertical-align:top"
            f"{';white-space:nowrap' if len(cell) <= MOST_UNBROKEN else ''}'>{escape(cell)}</td>"
            for cell in row
        )
        + "</tr>"
        for row in rows
    )
    return (
        f"<div style='overflow-x:auto'><table><caption style='text-align:left;"
        f"white-space:nowrap;{MUTED}'>"
        f"{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
        "</div>"
    )
