"""The library of named vectors in the panel of edits: its list, and making and measuring one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from djinn_nb import briefs, verbs
from djinn_nb.cards import MUTED, image
from djinn_nb.directions import METHODS
from djinn_nb.panels.base import notice_html, table
from djinn_nb.panels.fields import COLUMN, LABEL, field, show, within
from djinn_nb.panels.library_model import LibraryModel, VectorRow, provenance_text, rows_of
from djinn_nb.workbench import Workbench
from kernel_server.protocol.errors import DjinnError
from kernel_server.protocol.snapshot import Snapshot

if TYPE_CHECKING:
    from djinn_nb.strength import StrengthCurve


class Library:
    """A button that opens it, and its body.

    listed: told the vectors whenever they have been read. use: told the name of one to be used.
    """

    def __init__(
        self,
        bench: Workbench,
        listed: Callable[[tuple[VectorRow, ...]], None],
        use: Callable[[str], None],
    ) -> None:
        self._bench, self._listed, self._use = bench, listed, use
        self.rows: tuple[VectorRow, ...] = ()
        self._seen: object = None
        auto = widgets.Layout(width="auto")
        wrap = widgets.Layout(flex_flow="row wrap")
        column = {"flex": COLUMN, "min_width": "0", "width": "auto"}
        self.toggle = widgets.ToggleButton(
            description="Library of vectors", tooltip="Named vectors: list, make, measure",
            layout=widgets.Layout(width="auto", align_self="flex-start"),
        )  # fmt: skip
        self.toggle.observe(lambda change: self._open(change["new"]), "value")
        self._list, self._said = widgets.HTML(), widgets.HTML()
        self._curve = widgets.HTML()

        def button(text: str, tooltip: str, on_click: Callable[[], None]) -> widgets.Button:
            made = widgets.Button(description=text, tooltip=tooltip, layout=auto)
            made.on_click(lambda _: on_click())
            return made

        def text(label: str, placeholder: str, value: str = "") -> widgets.Text:
            return widgets.Text(
                value=value, description=label, placeholder=placeholder, layout=field(),
                style=LABEL,
            )  # fmt: skip

        def prompts(label: str, placeholder: str) -> widgets.Textarea:
            return widgets.Textarea(
                description=label, placeholder=placeholder, rows=3, layout=field(), style=LABEL
            )

        self._which = widgets.Dropdown(
            description="Named", options=[("none", "")], layout=field(), style=LABEL
        )
        self._which.observe(lambda change: self._ask_how(change["new"]), "value")
        #: how the one chosen was made
        self._how = widgets.HTML()
        self._take = button("Use it", "Add it to the value at the stop", self._used)
        self._sure = widgets.Checkbox(description="really:", indent=False, layout=auto)
        self._sure.observe(lambda _: self._fit(), "value")
        self._remove = button("Remove vector", "Remove it from the server", self._removed)
        self._alphas = text("Strengths", "-4, 0, 4", "-4, -2, 0, 2, 4")
        self._token = text("Of token", "' Mary': its probability; empty: texts alone")
        self._measure = button(
            "Strength curve", "Run this session's prompt at each strength", self._measured
        )
        self._measure.layout = widgets.Layout(width="auto", align_self="flex-start")
        self._name = text("Name", "joy")
        self._positive = prompts("Positive", "prompts that have it, one a line")
        self._negative = prompts("Negative", "prompts that have not, one a line")
        self._location = text("At", "where the session stands; 20, layers.20.middle")
        self._method = widgets.Dropdown(
            description="Method", layout=field(), style=LABEL,
            options=[(name.replace("_", " "), name) for name in METHODS],
        )  # fmt: skip
        self._tokens = text("Its tokens", '-1, chosen, all, " Mary"', "-1")
        self._replace = widgets.Checkbox(
            description="replace the one of this name", indent=False, layout=auto
        )
        self._make = button(
            "Make from prompts", "The direction from negative to positive prompts", self._made
        )
        self._keep = button(
            "Keep from this stop", "The value of its tokens where the session stands", self._kept
        )
        left = [
            self._name, self._positive, self._negative, self._location, self._method,
            self._tokens, self._replace, widgets.HBox([self._make, self._keep], layout=wrap),
        ]  # fmt: skip
        right = [
            self._which,
            self._how,
            widgets.HBox([self._take, self._sure, self._remove], layout=wrap),
            self._alphas, self._token, self._measure, self._curve,
        ]  # fmt: skip
        columns = [widgets.VBox(one, layout=widgets.Layout(**column)) for one in (left, right)]
        self.body = widgets.VBox([self._list, self._said, widgets.HBox(columns, layout=wrap)])
        show(self.body, False)
        self._fit()

    def model(self) -> LibraryModel:
        """What is typed, as the widgets hold it now."""
        return LibraryModel(
            name=self._name.value,
            positive=self._positive.value,
            negative=self._negative.value,
            location=self._location.value,
            method=self._method.value,
            tokens=self._tokens.value,
            replace=self._replace.value,
            alphas=self._alphas.value,
            token_text=self._token.value,
            chosen_token=self._bench.selection.token,
        )

    # -- the list -------------------------------------------------------------------------

    def _open(self, is_open: bool) -> None:
        show(self.body, is_open)
        if is_open:
            self.read()

    def read(self) -> None:
        """Ask the server for its vectors; the answer comes later."""
        if self._bench.current.server is not None:
            self._bench.ask("vectors", self._ask, self._read)

    def _ask(self) -> tuple[VectorRow, ...]:
        return rows_of(self._bench.current.need_server().vectors)

    def _read(self, rows: tuple[VectorRow, ...] | None, error: BaseException | None) -> None:
        if rows is None:
            if error is not None:
                self._said.value = notice_html(briefs.notice_of(error))
            return
        self.rows = rows
        self._list.value = within(library_html(rows))
        options = [("none", ""), *((row.text, row.name) for row in rows)]
        if tuple(options) != tuple(self._which.options):
            held = self._which.value
            self._which.options = options
            self._which.value = held if held in {row.name for row in rows} else ""
        self._fit()
        self._listed(rows)

    def _ask_how(self, name: str | None) -> None:
        self._how.value = ""
        if not name:
            return

        def told(found: dict[str, Any] | None, _: BaseException | None) -> None:
            if found is not None and self._which.value == name:
                text = escape(provenance_text(found))
                self._how.value = within(f"<div style='{MUTED}'>{text}</div>")

        self._bench.ask(
            "how a vector was made",
            lambda: self._bench.current.need_server().vectors[name].provenance,
            told,
        )

    def draw(self, shown: Snapshot) -> None:
        """Follow a snapshot: what was done or run since may have made a vector."""
        session = shown.session
        stopped = session is not None and session.status == "stopped"
        self._keep.disabled = not stopped
        self._measure.disabled = session is None
        self._make.disabled = "launch" not in shown.can
        done = [one.number for one in shown.actions if one.outcome != "running"]
        seen = (shown.connection, shown.address, len(shown.sessions), done[-1:])
        if self.toggle.value and shown.connection == "ready" and seen != self._seen:
            self._seen = seen
            self.read()

    def _fit(self) -> None:
        none = not self.rows
        self._take.disabled = self._sure.disabled = none
        self._remove.disabled = none or not self._sure.value

    def html(self) -> str:
        """The list as it was read last; empty where it was not opened."""
        return library_html(self.rows) if self.toggle.value or self.rows else ""

    # -- acting ---------------------------------------------------------------------------

    def _perform(self, verb: str, given: Callable[[], dict[str, Any]]) -> Future[Any] | None:
        try:
            future = verbs.perform(self._bench, verb, **given())
        except DjinnError as error:
            self._said.value = notice_html(briefs.notice_of(error))
            return None
        self._said.value = ""
        future.add_done_callback(lambda _: self.read())
        return future

    def _made(self) -> None:
        self._perform("make_vector", lambda: self.model().from_prompts())

    def _kept(self) -> None:
        self._perform("keep_vector", lambda: self.model().from_stop())

    def _removed(self) -> None:
        self._sure.value = False
        self._perform("remove_vector", lambda: {"name": self._which.value})

    def _used(self) -> None:
        if self._which.value:
            self._use(self._which.value)

    def _measured(self) -> None:
        name = self._which.value
        future = self._perform("strength_curve", lambda: self.model().curve(name))
        if future is not None:
            self._curve.value = (
                f"<span role='status' style='{MUTED}'>measuring {escape(name)} …</span>"
            )
            future.add_done_callback(self._drawn)

    def _drawn(self, future: Future[Any]) -> None:
        """Show a curve; what went wrong is said by the workbench."""
        failed = future.cancelled() or future.exception() is not None
        self._curve.value = "" if failed else within(curve_html(future.result()))


def library_html(rows: tuple[VectorRow, ...]) -> str:
    """The list of vectors; in words what to do where there is none."""
    return table(
        ("name", "made", "at", "norm", "channels", "date (UTC)", "model"),
        [
            (
                row.name,
                row.method,
                row.location,
                f"{row.norm:.4g}",
                str(row.width),
                row.date[:16].replace("T", " "),
                "these weights" if row.usable else row.note,
            )
            for row in rows
        ],
        "no named vector yet: two lists of prompts make one, or the token at this stop",
        "named vectors of this server · norm: L2 · made on these weights, or on others",
    )


def curve_html(curve: StrengthCurve) -> str:
    """The plot of a curve where there is a metric, and what was generated at each strength."""
    texts = table(
        ("direction", "strength", "text"),
        [
            (str(row.direction), f"{row.alpha:g}", row.error or row.text)
            for row in curve.frame.itertuples()
        ],
        "no runs",
        "greedy · random: of the same norm",
    )
    if not curve.metrics:
        return texts
    means = curve.mean()
    said = "; ".join(
        f"{direction} {alpha:g}: {value:.3g}"
        for (direction, alpha), value in means.iloc[:, 0].items()
    )
    return image(curve.plot(), f"{curve.metrics[0].name} by strength: {said}") + texts
