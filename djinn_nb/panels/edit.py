"""The panel of edits: what to change at the stop, how strongly, and what the next token would be.

The live preview asks at most one question at a time; the newest wish wins. `EditModel` holds the
wishes without widgets, and makes of them what `stop.edit` and `stop.preview` take.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from djinn_nb import briefs
from djinn_nb.cards import MONO, MUTED
from djinn_nb.panels.base import NONE, Panel, notice_html, table
from djinn_nb.selectors import PHASES
from kernel_server.protocol.errors import BadArgument
from kernel_server.protocol.snapshot import Snapshot

if TYPE_CHECKING:
    from djinn_nb.previews import Preview
    from djinn_nb.stopped import Stopped

#: kind -> (its slider's least, most, start, step; None: no strength), at a residual-like tensor
KINDS: dict[str, tuple[float, float, float, float] | None] = {
    "scale": (-2.0, 4.0, 1.0, 0.05),
    "add a vector": (-16.0, 16.0, 0.0, 0.25),
    "clamp": (0.0, 20.0, 20.0, 0.1),
    "zero": None,
    "mean": None,
    "project out a vector": None,
}
#: of the next token, at `logits`
TOKEN_KINDS = ("force", "ban")
OF_VECTORS = ("add a vector", "project out a vector")
#: Candidates shown of the next token.
TOP_K = 8
#: What is shown as stopped is bound in the notebook well within this, seconds.
BOUND_S = 2.0


@dataclass(slots=True)
class EditModel:
    """What the person wants changed, as the widgets hold it.

    >>> EditModel(kind="scale", strength=0.9, tokens="-1").wishes()
    {'scale': 0.9, 'tokens': -1}
    """

    kind: str = "scale"
    strength: float = 1.0
    tokens: str = "-1"
    heads: str = ""
    vector: str | None = None
    #: of `force` and `ban`: the token's text
    token_text: str = ""
    sticky: bool = False

    def wishes(self) -> dict[str, Any]:
        """Keywords of `stop.edit`; raises BadArgument for what is missing or cannot be read."""
        found = self._of_kind()
        if self.kind not in TOKEN_KINDS:
            found["tokens"] = selection(self.tokens, "tokens", words=PHASES)
            if self.heads.strip():
                found["heads"] = selection(self.heads, "heads")
        if self.sticky:
            found["sticky"] = True
        return found

    def _of_kind(self) -> dict[str, Any]:
        if self.kind in OF_VECTORS and not self.vector:
            raise BadArgument("choose a named vector; server.vectors.from_prompts() makes one")
        if self.kind in TOKEN_KINDS and not self.token_text:
            raise BadArgument("write the token's text, with its leading space: ' Mary'")
        match self.kind:
            case "scale":
                return {"scale": self.strength}
            case "add a vector":
                return {"vector": self.vector, "alpha": self.strength}
            case "clamp":
                return {"clamp": (-self.strength, self.strength)}
            case "zero":
                return {"zero": True}
            case "mean":
                return {"mean": True}
            case "project out a vector":
                return {"project_out": self.vector}
            case "force" | "ban":
                return {self.kind: self.token_text}
        raise BadArgument(f"no such kind: {self.kind}")


def selection(text: str, what: str, words: Sequence[str] = ()) -> Any:
    """A selector as people write it: -1, 3:7, [0, 2], a phase, or the text of a token.

    >>> selection("3:7", "tokens"), selection("[0, 2]", "heads")
    (slice(3, 7, None), [0, 2])
    """
    text = text.strip("\n")
    bare = text.strip()
    if bare in words:
        return bare
    parts = bare.split(":")
    try:
        if 2 <= len(parts) <= 3:
            return slice(*(int(part) if part.strip() else None for part in parts))
        return ast.literal_eval(bare)
    except (ValueError, SyntaxError):
        if words and bare:
            return text  # the text of a token; a space in front belongs to it
        raise BadArgument(f"{what}: write a number, a slice (3:7) or a list ([0, 2])") from None


def preview_html(found: Preview, took_s: float) -> str:
    """The next token with the edit and without."""
    frame = found.frame.head(TOP_K)
    rows = [
        (repr(row.text) if row.text else str(row.token_id), *_share(row.before), *_share(row.after))
        for row in frame.itertuples()
    ]
    head = "".join(
        f"<th scope='col' style='text-align:left;padding-right:8px'>{name}</th>"
        for name in ("next token", "before", "", "after", "")
    )
    lines = "".join(
        "<tr>"
        f"<td style='text-align:left;{MONO};white-space:pre;padding-right:8px'>{escape(name)}</td>"
        f"<td>{before}</td><td style='text-align:left'>{bar}</td>"
        f"<td>{after}</td><td style='text-align:left'>{other}</td></tr>"
        for name, before, bar, after, other in rows
    )
    caption = (
        f"probability of the next token, 0 to 1 · KL {found.kl:.3f} nats ·"
        f" {found.elements_changed} numbers changed · answered in {1000 * took_s:.0f} ms"
    )
    return (
        f"<div style='{MUTED}'>{caption}</div><table aria-live='polite'>"
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    )


def _share(share: float) -> tuple[str, str]:
    """A probability as text and as a bar."""
    return f"{share:.3f}", (
        f"<span style='display:inline-block;height:9px;width:{max(1, round(90 * share))}px;"
        "background:currentColor;opacity:.55'></span>"
    )


class EditPanel(Panel):
    """Edit at the stop, with a live preview of the next token."""

    name, title = "edit", "Edit and steer"

    def make(self) -> Sequence[widgets.Widget]:
        auto = widgets.Layout(width="auto")
        self._kind = widgets.Dropdown(description="Kind", options=list(KINDS))
        self._strength = widgets.FloatSlider(
            description="Strength", continuous_update=True, readout_format=".2f",
            layout=widgets.Layout(width="420px"),
        )  # fmt: skip
        self._tokens = widgets.Text(
            value="-1", description="Tokens", placeholder='-1, 3:7, prompt, " Mary"',
            layout=widgets.Layout(width="240px"),
        )  # fmt: skip
        self._heads = widgets.Text(
            description="Heads", placeholder="all heads",
            layout=widgets.Layout(width="240px"),
        )  # fmt: skip
        self._vector = widgets.Dropdown(description="Vector", options=[("none", "")])
        self._text = widgets.Text(description="Token", placeholder="' Mary', space and all")
        self._sticky = widgets.Checkbox(
            description="sticky: in every later forward too", indent=False, layout=auto
        )
        self._apply = widgets.Button(description="Apply", tooltip="Edit the stop", layout=auto)
        self._apply.on_click(self._applied)
        self._undo = self.button("Undo", "undo", "Take the last edit at this stop back")
        self._place = widgets.HTML()
        self._preview = widgets.HTML()
        #: says that what is shown is of an older wish
        self._updating = widgets.HTML()
        self._refused = widgets.HTML()
        self._which = widgets.Dropdown(
            description="Edit", options=[("none", NONE)], layout=widgets.Layout(width="auto")
        )
        self._remove = widgets.Button(description="Remove", layout=auto)
        self._remove.on_click(lambda _: self._on_edit("remove_edit"))
        self._list = widgets.HTML()
        self._at: tuple[Any, ...] = ()
        self._fit("scale")
        self._kind.observe(lambda change: self._fit(change["new"]), "value")
        for one in (self._kind, self._strength, self._tokens, self._heads, self._vector,
                    self._text):  # fmt: skip
            one.observe(lambda _: self._wish(), "value")
        wrap = widgets.Layout(flex_flow="row wrap")
        return [
            self._place,
            widgets.HBox([self._kind, self._vector, self._text], layout=wrap),
            self._strength,
            widgets.HBox([self._tokens, self._heads], layout=wrap),
            widgets.HBox([self._sticky, self._apply, self._undo], layout=wrap),
            self._refused,
            self._updating,
            self._preview,
            widgets.HBox([self._which, self._remove], layout=wrap),
            self._list,
        ]

    def model(self) -> EditModel:
        """The wishes as the widgets hold them now."""
        return EditModel(
            kind=self._kind.value,
            strength=round(self._strength.value, 6),
            tokens=self._tokens.value,
            heads=self._heads.value,
            vector=self._vector.value or None,
            token_text=_unquoted(self._text.value),
            sticky=self._sticky.value,
        )

    def _fit(self, kind: str | None) -> None:
        """Show the widgets that a kind needs, with a slider of its range."""
        span = KINDS.get(kind or "")
        _show(self._strength, span is not None)
        _show(self._vector, kind in OF_VECTORS)
        _show(self._text, kind in TOKEN_KINDS)
        for one in (self._tokens, self._heads):
            _show(one, kind not in TOKEN_KINDS)
        if span is not None:
            least, most, start, step = span
            with self._strength.hold_trait_notifications():
                self._strength.min, self._strength.max = least, most
                self._strength.step, self._strength.value = step, start
        if kind in OF_VECTORS:
            self.bench.ask("vectors", self._names, self._named)

    def _names(self) -> list[str]:
        return list(self.bench.current.need_server().vectors)

    def _named(self, names: list[str] | None, error: BaseException | None) -> None:
        options = [("none", ""), *((name, name) for name in names or ())]
        if tuple(options) != tuple(self._vector.options):
            self._vector.options = options
        if not names and error is None:
            self._refused.value = (
                f"<div style='{MUTED}'>no named vector yet:"
                " server.vectors.from_prompts() makes one</div>"
            )

    # -- the live preview -----------------------------------------------------------------

    def _wish(self) -> None:
        session = self.bench.snapshot().session
        if session is None or session.status != "stopped":
            return
        number = session.stop_number
        try:
            wishes = self.model().wishes()
        except BadArgument as error:
            self._refused.value = notice_html(briefs.notice_of(error))
            return
        began = time.monotonic()
        self._updating.value = f"<span role='status' style='{MUTED}'>updating …</span>"
        self.bench.ask(
            f"preview {id(self)}",
            lambda: _asked(self._stop(number), wishes),
            lambda found, error: self._previewed(found, error, time.monotonic() - began),
        )

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
        self._preview.value = "" if found is None else preview_html(found, took_s)

    # -- acting ---------------------------------------------------------------------------

    def _applied(self, _: object) -> None:
        try:
            wishes = self.model().wishes()
        except BadArgument as error:
            self._refused.value = notice_html(briefs.notice_of(error))
            return
        self.perform("edit", **wishes)

    def _on_edit(self, verb: str) -> None:
        if self._which.value != NONE:
            self.perform(verb, id=self._which.value)

    def draw(self, shown: Snapshot) -> None:
        session = shown.session
        stopped = session is not None and session.status == "stopped"
        self._place.value = _place_html(shown)
        self._apply.disabled = not stopped
        self._undo.disabled = "undo" not in shown.can
        kinds = list(KINDS)
        if session is not None and session.location == "logits":
            kinds = [*TOKEN_KINDS, *(kind for kind in kinds if kind not in OF_VECTORS)]
        if list(self._kind.options) != kinds:
            self._kind.options = kinds
        options = [("none", NONE), *((f"{e.id} {e.text}"[:80], e.id) for e in shown.edits)]
        if tuple(options) != tuple(self._which.options):
            self._which.options = options
        self._remove.disabled = not shown.edits
        self._list.value = _edits_html(shown)
        at = () if session is None else (session.id, session.stop_number, shown.edits)
        if stopped and at != self._at:
            self._at = at
            self._wish()
        if not stopped:
            self._at, self._preview.value = (), ""

    def html(self, shown: Snapshot) -> str:
        preview = self._preview.value if self._body is not None else ""
        return _place_html(shown) + preview + _edits_html(shown)


def _asked(stop: Stopped, wishes: dict[str, Any]) -> Preview:
    """A preview with all its logits here, so that nothing more is asked when it is drawn."""
    found = stop.preview(**wishes, top_k=TOP_K)
    _ = found.logits_after
    return found


def _place_html(shown: Snapshot) -> str:
    session = shown.session
    if session is None or session.status != "stopped":
        text = "nothing is stopped: launch a prompt with a breakpoint set, or pause a session"
        return f"<div style='{MUTED}'>{text}</div>"
    return f"<div>at <b>{escape(str(session.location))}</b>, forward {session.forward}</div>"


def _edits_html(shown: Snapshot) -> str:
    rows = [
        (str(edit.id), edit.text, "at this stop" if edit.at_this_stop else "")
        for edit in shown.edits
    ]
    return table(
        ("id", "edit", ""), rows, "no edit has been made", "edits, in the order they apply"
    )


def _show(widget: widgets.Widget, on: bool) -> None:
    widget.layout.display = None if on else "none"


def _unquoted(text: str) -> str:
    """The text of a token; quotes around it, which show its spaces, are taken away."""
    bare = text.strip()
    if len(bare) >= 2 and bare[0] == bare[-1] and bare[0] in "'\"":
        return bare[1:-1]
    return text
