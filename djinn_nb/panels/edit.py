"""The panel of edits: what to change at the stop, how strongly, and what the next token would be.

Only the fields that a kind needs are shown; which, and what they mean, is decided in `edit_model`.
The live preview asks at most one question at a time; the newest wish wins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from djinn_nb import briefs, edit_verbs
from djinn_nb.cards import MONO, MUTED
from djinn_nb.panels.base import NONE, Panel, notice_html, table
from djinn_nb.panels.edit_model import KINDS, OF_VECTORS, EditModel, Target, sources_of
from djinn_nb.panels.fields import COLUMN, LABEL, field, offer, show, within
from djinn_nb.panels.library import Library
from djinn_nb.panels.library_model import VectorRow
from djinn_nb.previews import probability_text
from djinn_nb.steps import words
from kernel_server.protocol.errors import DjinnError
from kernel_server.protocol.snapshot import EditBrief, Notice, Snapshot

if TYPE_CHECKING:
    from djinn_nb.previews import Preview
    from djinn_nb.stopped import Stopped

#: Candidates shown of the next token.
TOP_K = 8
#: What is shown as stopped is bound in the notebook well within this, seconds.
BOUND_S = 2.0
#: Words that a button writes into the field of tokens: word -> what it selects
TOKEN_WORDS = {
    "last": "the last token fed",
    "chosen": "the token chosen in the panels",
    "all": "all tokens of this forward",
    "prompt": "the prompt's tokens",
}


def preview_html(found: Preview, took_s: float) -> str:
    """The next token with the edit and without."""
    whole = found.frame
    # the most probable of either arm: what an edit takes away is seen beside what it brings
    order = whole[["before", "after"]].max(axis=1).sort_values(ascending=False, kind="stable")
    frame = whole.loc[order.index[:TOP_K]]
    rows = [
        (repr(row.text) if row.text else str(row.token_id), *_share(row.before), *_share(row.after))
        for row in frame.itertuples()
    ]
    head = "<th scope='col' style='text-align:left;padding-right:8px'>next token</th>" + "".join(
        f"<th scope='col' colspan='2' style='text-align:left'>{name}</th>"
        for name in ("before", "after")
    )
    lines = "".join(
        "<tr>"
        f"<td style='text-align:left;{MONO};white-space:pre;padding-right:8px'>{escape(name)}</td>"
        f"<td>{escape(before)}</td><td style='text-align:left;padding-right:16px'>{bar}</td>"
        f"<td>{escape(after)}</td><td style='text-align:left'>{other}</td></tr>"
        for name, before, bar, after, other in rows
    )
    caption = (
        f"probability of the next token, 0 to 1 · KL {found.kl:.3f} nats ·"
        f" {found.elements_changed} numbers changed · answered in {1000 * took_s:.0f} ms"
    )
    return (
        f"<div style='{MUTED}'>{caption}</div>"
        f"<table aria-live='polite'><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    )


def _share(share: float) -> tuple[str, str]:
    """A probability as text and as a bar."""
    return probability_text(share), (
        f"<span style='display:inline-block;height:9px;width:{max(1, round(60 * share))}px;"
        "background:currentColor;opacity:.55'></span>"
    )


class EditPanel(Panel):
    """Edit at the stop, with a live preview of the next token."""

    name, title = "edit", "Edit and steer"

    def make(self) -> Sequence[widgets.Widget]:
        self._target: Target | None = None
        self._target_key: object = None
        self._at: tuple[Any, ...] = ()
        #: counts wishes that could not be read: an answer to one before is out of date
        self._unreadable = 0
        self._make_fields()
        self._library = Library(self.bench, self._listed, self._use)
        auto = widgets.Layout(width="auto")
        self._sticky = widgets.Checkbox(
            description="Make sticky", indent=False, layout=auto,
            tooltip="Apply in every later forward too, without stopping",
        )  # fmt: skip
        self._apply = widgets.Button(description="Apply", tooltip="Edit the stop", layout=auto)
        self._apply.on_click(self._applied)
        self._undo = self.button("Undo", "undo", "Take the last edit at this stop back")
        self._place = widgets.HTML()
        #: why a field is off
        self._why = widgets.HTML()
        self._preview = widgets.HTML()
        #: says that what is shown is of an older wish
        self._updating = widgets.HTML()
        self._refused = widgets.HTML()
        self._which = widgets.Dropdown(
            description="Edit", options=[("none", NONE)], layout=field(), style=LABEL
        )
        self._which.layout.flex = "1 1 200px"
        self._which.observe(lambda _: self._fit_switch(), "value")
        self._switch = widgets.Button(description="Disable", layout=auto)
        self._switch.on_click(self._switched)
        self._remove = widgets.Button(description="Remove", layout=auto)
        self._remove.on_click(lambda _: self._on_edit("remove_edit"))
        self._list = widgets.HTML()
        self._fit("scale")
        self._kind.observe(lambda change: self._fit(change["new"]), "value")
        self._exact.observe(self._typed, "value")
        self._strength.observe(self._slid, "value")
        for one in {one for parts in self._parts.values() for one in parts}:
            if isinstance(one, widgets.ValueWidget) and one is not self._exact:
                one.observe(lambda _: self._wish(), "value")
        for one in (self._kind, self._sticky):
            one.observe(lambda _: self._wish(), "value")
        self._vector.observe(lambda _: self._show_inexact(), "value")
        wrap = widgets.Layout(flex_flow="row wrap")
        apart = widgets.Layout(flex_flow="row wrap", grid_gap="4px 20px")
        column = {"flex": COLUMN, "min_width": "0", "width": "auto"}
        left = widgets.VBox(
            [
                self._kind,
                *dict.fromkeys(row for rows in self._rows.values() for row in rows),
                self._why,
                widgets.HBox([self._apply, self._undo, self._sticky], layout=wrap),
                self._refused,
            ],
            layout=widgets.Layout(**column),
        )
        right = widgets.VBox([self._updating, self._preview], layout=widgets.Layout(**column))
        self._preview.layout = widgets.Layout(width="auto", min_width="0")
        return [
            self._place,
            widgets.HBox([left, right], layout=apart),
            widgets.HBox([self._which, self._switch, self._remove], layout=wrap),
            self._list,
            self._library.toggle,
            self._library.body,
        ]

    def _make_fields(self) -> None:
        """One widget per field of `EditModel`, and the row that is shown with it."""

        def text(label: str, placeholder: str, value: str = "") -> widgets.Text:
            return widgets.Text(
                value=value, description=label, placeholder=placeholder, layout=field(),
                style=LABEL,
            )  # fmt: skip

        def choice(label: str, options: list[Any]) -> widgets.Dropdown:
            return widgets.Dropdown(description=label, options=options, layout=field(), style=LABEL)

        self._kind = choice("Kind", list(KINDS))
        self._strength = widgets.FloatSlider(
            description="Strength", continuous_update=True, readout=False, layout=field(),
            style=LABEL,
        )  # fmt: skip
        self._exact = widgets.FloatText(
            description="exactly", layout=widgets.Layout(width="150px"),
            style={"description_width": "50px"},
        )  # fmt: skip
        self._vector = choice("Vector", [("none", "")])
        self._inexact = widgets.Checkbox(
            description="also one made on another model", indent=False, layout=field()
        )
        self._least = text("Least", "no bound")
        self._largest = text("Largest", "no bound")
        self._tokens = text("Tokens", '-1, 3:7, [0, 2], " Mary"', "-1")
        self._first = text("Token", "3")
        self._second = text("With token", "-1")
        self._heads = text("Heads", "all heads; 0, 2:4, [0, 2]")
        self._channels = text("Channels", "all channels; 5, 0:64, [3, 7]")
        self._layer = choice("Layer", [("none", NONE)])
        self._ablated = text("Which", "3, 0:4, [0, 2]")
        self._mean = widgets.Checkbox(
            description="their mean over the tokens, instead of 0", indent=False, layout=field()
        )
        self._source = choice("From", [("none", NONE)])
        self._rows_there = text("Its tokens", "the same as below")
        self._text = text("Token", "' Mary', space and all")
        self._instead = text("Instead", "' John', drawn in its place")
        self._words = {}
        for word, said in TOKEN_WORDS.items():
            button = widgets.Button(
                description=word, tooltip=f"Tokens: {said}", layout=widgets.Layout(width="auto")
            )
            button.on_click(lambda _, word=word: setattr(self._tokens, "value", word))
            self._words[word] = button
        wrap = widgets.Layout(flex_flow="row wrap")
        strength = widgets.HBox([self._strength, self._exact], layout=wrap)
        self._strength.layout.flex = "1 1 200px"
        wordy = widgets.HBox(
            [*self._words.values()],
            layout=widgets.Layout(flex_flow="row wrap", margin="0 0 0 76px"),
        )
        #: field -> the widgets that hold it
        self._parts: dict[str, list[widgets.Widget]] = {
            "vector": [self._vector, self._inexact],
            "strength": [self._strength, self._exact],
            "least": [self._least],
            "largest": [self._largest],
            "token_text": [self._text],
            "instead": [self._instead],
            "layer": [self._layer],
            "ablated": [self._ablated],
            "mean": [self._mean],
            "source": [self._source],
            "rows": [self._rows_there],
            "tokens": [self._tokens],
            "first": [self._first],
            "second": [self._second],
            "heads": [self._heads],
            "channels": [self._channels],
        }
        #: field -> the rows shown with it
        self._rows: dict[str, list[widgets.Widget]] = dict(self._parts)
        self._rows["strength"] = [strength]
        self._rows["tokens"] = [self._tokens, wordy]

    def model(self) -> EditModel:
        """The wishes as the widgets hold them now."""
        chosen = self.bench.selection
        return EditModel(
            kind=self._kind.value,
            strength=round(self._strength.value, 6),
            tokens=self._tokens.value,
            heads="" if self._heads.disabled else self._heads.value,
            channels="" if self._channels.disabled else self._channels.value,
            vector=self._vector.value or None,
            inexact=self._inexact.value and self._vector.value in self._foreign,
            least=self._least.value,
            largest=self._largest.value,
            first=self._first.value,
            second=self._second.value,
            layer=None if self._layer.value == NONE else self._layer.value,
            ablated=self._ablated.value,
            mean=self._mean.value,
            source=None if self._source.value == NONE else self._source.value,
            rows=self._rows_there.value,
            token_text=self._text.value,
            instead=self._instead.value,
            sticky=self._sticky.value,
            chosen_token=chosen.token,
            chosen_head=chosen.head,
        )

    # -- what is shown of the fields ------------------------------------------------------

    #: names of vectors that were made on other weights
    _foreign: frozenset[str] = frozenset()

    def _fit(self, kind: str | None) -> None:
        """Show the widgets that a kind needs, with a slider of its range."""
        asked = KINDS.get(kind or "")
        if asked is None:
            return
        for name, rows in self._rows.items():
            for one in (*rows, *self._parts[name]):
                show(one, name in asked.fields)
        if asked.span is not None:
            least, most, start, step = asked.span
            self._set_slider(min=least, max=most, step=step, value=start)
            self._strength.tooltip = f"Strength: {asked.strength}"
            self._exact.value = start
        self._fit_target()
        self._show_inexact()
        if kind in OF_VECTORS:
            self._library.read()

    def _fit_target(self) -> None:
        """Turn off, with the reason, what the tensor here has not; offer the layers ahead."""
        kind, target = self._kind.value, self._target
        off = {} if target is None or kind not in KINDS else target.off(kind)
        for name, one in (
            ("heads", self._heads), ("channels", self._channels), ("sticky", self._sticky),
        ):  # fmt: skip
            one.disabled = name in off
            one.tooltip = off.get(name, "")
        said = "".join(f"<div>no {name}: {escape(why)}</div>" for name, why in off.items())
        self._why.value = f"<div style='{MUTED}'>{said}</div>" if said else ""
        ahead = () if target is None else target.ahead.get(kind, ())
        options = [(str(layer), layer) for layer in ahead] or [("none", NONE)]
        if tuple(options) != tuple(self._layer.options):
            held, chosen = self._layer.value, self.bench.selection.layer
            self._layer.options = options
            self._layer.value = next((n for n in (held, chosen) if n in ahead), options[0][1])

    def _typed(self, change: dict[str, Any]) -> None:
        """A strength that is typed widens the slider where it has to."""
        wanted, slider = change["new"], self._strength
        if not math.isfinite(wanted):
            self._exact.value = slider.value
            return
        self._set_slider(min=min(slider.min, wanted), max=max(slider.max, wanted), value=wanted)

    def _set_slider(self, **given: float) -> None:
        """All at once: a browser that hears of the range first answers with a value of its own."""
        with self._strength.hold_sync(), self._strength.hold_trait_notifications():
            for name, value in given.items():
                setattr(self._strength, name, value)

    def _slid(self, change: dict[str, Any]) -> None:
        self._exact.value = change["new"]
        if self._kind.value == "clamp":
            most = round(abs(change["new"]), 6)
            self._least.value, self._largest.value = f"{-most:g}", f"{most:g}"

    def _listed(self, rows: tuple[VectorRow, ...]) -> None:
        """Offer the vectors that the server has."""
        self._foreign = frozenset(row.name for row in rows if not row.usable)
        options = [("none", ""), *((row.text, row.name) for row in rows)]
        if tuple(options) != tuple(self._vector.options):
            held = self._vector.value
            self._vector.options = options
            self._vector.value = held if held in {row.name for row in rows} else ""
        self._show_inexact()

    def _use(self, name: str) -> None:
        """Have a vector of the library added at the stop."""
        if OF_VECTORS[0] in self._kind.options:
            if self._kind.value not in OF_VECTORS:
                self._kind.value = OF_VECTORS[0]
            self._vector.value = name

    def _show_inexact(self) -> None:
        show(
            self._inexact,
            self._kind.value in OF_VECTORS and self._vector.value in self._foreign,
        )

    # -- the live preview -----------------------------------------------------------------

    def _wish(self) -> None:
        session = self.bench.snapshot().session
        if session is None or session.status != "stopped":
            return
        number = session.stop_number
        try:
            model = self.model()
            verb, wishes = model.verb, model.wishes()
        except DjinnError as error:  # not written to its end: no fault yet
            self._unreadable += 1
            self._preview.value = self._updating.value = ""
            said = briefs.notice_of(error).text
            self._refused.value = notice_html(Notice(level="info", code=error.code, text=said))
            return
        began, asked = time.monotonic(), (self._at, self._unreadable)
        self._updating.value = f"<span role='status' style='{MUTED}'>updating …</span>"
        self.bench.ask(
            f"preview {id(self)}",
            lambda: self._asked(self._stop(number), verb, wishes),
            lambda found, error: (
                self._previewed(found, error, time.monotonic() - began)
                if asked == (self._at, self._unreadable)
                else None  # out of date: of a stop that has gone, or a wish that was given up
            ),
        )

    def _asked(self, stop: Stopped, verb: str, wishes: dict[str, Any]) -> Preview:
        """A preview with all its logits here, so that nothing more is asked when it is drawn."""
        found = edit_verbs.preview(self.bench, stop, verb, wishes, top_k=TOP_K)
        _ = found.logits_after
        return found

    def _stop(self, number: int) -> Stopped:
        """The notebook's stop, once it is the one shown: a snapshot may come before it is bound.

        One that stays another is asked all the same: the server says that it is out of date.
        """
        deadline = time.monotonic() + BOUND_S
        while True:
            found = self.bench.current.stop
            late = time.monotonic() > deadline
            if found is not None and (late or found.number == number):
                return found
            if late:
                return self.bench.current.need_stop()
            time.sleep(0.02)

    def _previewed(self, found: Preview | None, error: BaseException | None, took_s: float) -> None:
        self._updating.value = ""
        self._refused.value = "" if error is None else notice_html(briefs.notice_of(error))
        self._preview.value = "" if found is None else within(preview_html(found, took_s))

    # -- acting ---------------------------------------------------------------------------

    def _applied(self, _: object) -> None:
        try:
            model = self.model()
            verb, wishes = model.verb, model.wishes()
        except DjinnError as error:
            self._refused.value = notice_html(briefs.notice_of(error))
            return
        self.perform(verb, **wishes)

    def _on_edit(self, verb: str, **more: Any) -> None:
        if self._which.value != NONE:
            self.perform(verb, id=self._which.value, **more)

    def _chosen_edit(self) -> Any:
        edits = self.bench.snapshot().edits
        return next((one for one in edits if one.id == self._which.value), None)

    def _fit_switch(self) -> None:
        found = self._chosen_edit()
        self._switch.disabled = self._remove.disabled = found is None
        off = found is not None and not found.enabled
        self._switch.description = "Enable" if off else "Disable"

    def _switched(self, _: object) -> None:
        found = self._chosen_edit()
        if found is not None:
            self._on_edit("enable_edit", enabled=not found.enabled)

    # -- drawing --------------------------------------------------------------------------

    def draw(self, shown: Snapshot) -> None:
        session = shown.session
        stopped = session is not None and session.status == "stopped"
        self._place.value = _place_html(shown)
        self._apply.disabled = not stopped
        self._undo.disabled = "undo" not in shown.can
        self._follow_target(shown)
        token = shown.selection.token
        self._words["chosen"].disabled = token is None
        self._words["chosen"].description = "chosen" if token is None else f"chosen ({token})"
        offer(self._source, sources_of(shown))
        offer(self._which, [(e.text[:80], e.id) for e in shown.edits])
        if self._which.value == NONE and shown.edits:
            self._which.value = shown.edits[-1].id
        self._fit_switch()
        self._list.value = within(_edits_html(shown))
        self._library.draw(shown)
        at: tuple[Any, ...] = ()
        if session is not None and stopped:
            choice = shown.selection if self.model().follows_the_choice else None
            at = (session.id, session.stop_number, shown.edits, choice)
            if at != self._at:
                self._at = at
                self._wish()
        if not stopped:
            self._at = ()
            self._preview.value = self._updating.value = self._refused.value = ""

    def _follow_target(self, shown: Snapshot) -> None:
        """Offer what the tensor at the stop can be changed in."""
        session, server = shown.session, self.bench.current.server
        model = None if server is None else server.client.known_model
        location = None if session is None else session.location
        if model is None or location is None or (location, id(model)) == self._target_key:
            return
        self._target_key = (location, id(model))
        self._target = Target.at(model, location)
        kinds = self._target.kinds
        if tuple(self._kind.options) != kinds:
            held = self._kind.value
            self._kind.options = kinds
            if held in kinds:
                self._kind.value = held
        self._fit_target()

    def html(self, shown: Snapshot) -> str:
        if self._body is None:
            return _place_html(shown) + _edits_html(shown)
        return (
            f"{_place_html(shown)}{self._wish_html(shown)}{self._preview.value}"
            f"{_edits_html(shown)}{self._library.html()}"
        )

    def _wish_html(self, shown: Snapshot) -> str:
        """What the fields ask for, in one line."""
        if shown.session is None or shown.session.status != "stopped":
            return ""
        try:
            model = self.model()
            text = f"{model.kind}: {words(model.wishes())}"
        except DjinnError as error:
            return notice_html(briefs.notice_of(error))
        return f"<div style='{MONO}'>{escape(text)}</div>"


def _place_html(shown: Snapshot) -> str:
    session = shown.session
    if session is None or session.status != "stopped":
        text = "nothing is stopped: launch a prompt with a breakpoint set, or pause a session"
        return f"<div style='{MUTED}'>{text}</div>"
    return f"<div>at <b>{escape(str(session.location))}</b>, forward {session.forward}</div>"


def _state(edit: EditBrief) -> str:
    found = ["sticky"] if edit.sticky else []
    found += ["at this stop"] if edit.at_this_stop else []
    return ", ".join([*found, *([] if edit.enabled else ["disabled"])])


def _edits_html(shown: Snapshot) -> str:
    rows = [(str(edit.id), edit.text, _state(edit)) for edit in shown.edits]
    return table(
        ("id", "edit", "state"), rows, "no edit has been made", "edits, in the order they apply"
    )
