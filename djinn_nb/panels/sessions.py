"""The panel of sessions: where each stands, and the buttons that run the current one."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as widgets

from djinn_nb.panels.base import Panel, table
from kernel_server.protocol.snapshot import SessionBrief, Snapshot

MIB = 1 << 20

#: verb -> text and tooltip of its button, in the order shown
BUTTONS = {
    "continue": ("Continue", "Run until something stops the session"),
    "pause": ("Pause", "Stop at the next layer boundary"),
    "next": ("Next layer", "Run to the next layer's output"),
    "step_in": ("Next site", "Run to the next site, inside the layer or at its end"),
    "step_out": ("To logits", "Run to this forward's logits"),
    "step_back": ("Step back", "Return to the previous stop"),
    "look": ("Look again", "Show where the session stands now"),
    "fork": ("Fork", "Copy the session as it stands; the copy becomes the current one"),
    "evict": ("Evict", "Let its pages leave the device for the host's memory"),
    "restore": ("Restore", "Bring its pages back to the device"),
}


def where_of(session: SessionBrief) -> str:
    """Status and place of a session in words."""
    reason = f" ({session.reason})" if session.reason and session.status == "stopped" else ""
    place = f" at {session.location}" if session.location else ""
    return f"{session.status}{place}{reason}, forward {session.forward}"


def rows_of(shown: Snapshot) -> list[tuple[str, ...]]:
    """A row per session: current, id, name, where, tokens, KV, tier, owner."""
    return [
        (
            "▶" if one.id == shown.session_id else "",
            one.id,
            one.name if one.name != one.id else "",
            where_of(one) + (f": {one.error}" if one.error else ""),
            f"{one.num_tokens} of {one.num_prompt_tokens + one.max_new_tokens}",
            f"{one.kv_bytes / MIB:.1f} MiB",
            one.tier + (" · pinned" if one.pinned else ""),
            one.owner,
        )
        for one in shown.sessions
    ]


def _label(session: SessionBrief) -> str:
    named = session.name not in ("", session.id)
    return f"{session.id} {session.name}" if named else session.id


class SessionsPanel(Panel):
    """Sessions of this server, and the run controls of the current one."""

    name, title = "sessions", "Sessions"

    def make(self) -> Sequence[widgets.Widget]:
        self._prompt = widgets.Textarea(
            placeholder="A prompt to debug", description="Prompt", rows=2,
            layout=widgets.Layout(width="auto"),
        )  # fmt: skip
        self._tokens = widgets.BoundedIntText(
            value=24, min=1, max=100_000, description="New tokens",
            layout=widgets.Layout(width="180px"),
        )  # fmt: skip
        self._connect = self.button("Connect", "connect", "Connect to a server on this machine")
        self._launch = widgets.Button(
            description="Launch", tooltip="Run the prompt to its first stop",
            layout=widgets.Layout(width="auto"),
        )  # fmt: skip
        self._launch.on_click(
            lambda _: self.perform(
                "launch", prompt=self._prompt.value, max_new_tokens=self._tokens.value
            )
        )
        self._buttons = {
            verb: self.button(text, verb, tooltip) for verb, (text, tooltip) in BUTTONS.items()
        }
        self._choice = widgets.Dropdown(
            description="Current", options=[("none", "")], layout=widgets.Layout(width="auto")
        )
        self._choice.observe(self._chosen, "value")
        self._sure = widgets.Checkbox(
            description="really:", value=False, indent=False,
            layout=widgets.Layout(width="auto"),
        )  # fmt: skip
        self._terminate = widgets.Button(
            description="Terminate", tooltip="End the session and free what it holds",
            layout=widgets.Layout(width="auto"), disabled=True,
        )  # fmt: skip
        self._terminate.on_click(self._end_session)
        self._sure.observe(lambda _: self._enable_end(), "value")
        self._progress = widgets.FloatProgress(
            min=0, max=1, description="", layout=widgets.Layout(width="100%", display="none")
        )
        self._list = widgets.HTML()
        wrap = widgets.Layout(flex_flow="row wrap")
        return [
            self._progress,
            widgets.HBox([self._connect, self._tokens, self._launch], layout=wrap),
            self._prompt,
            widgets.HBox([self._choice, *self._buttons.values()], layout=wrap),
            widgets.HBox([self._sure, self._terminate], layout=wrap),
            self._list,
        ]

    def _end_session(self, _: object) -> None:
        self._sure.value = False
        self.perform("terminate")

    def _enable_end(self) -> None:
        can = "terminate" in self.bench.snapshot().can
        self._terminate.disabled = not (can and self._sure.value)

    def _chosen(self, change: dict[str, object]) -> None:
        wanted = change["new"]
        if wanted and wanted != self.bench.snapshot().session_id:
            self.perform("attach", session=wanted)

    def draw(self, shown: Snapshot) -> None:
        for verb, made in self._buttons.items():
            made.disabled = verb not in shown.can
        self._buttons["look"].layout.display = (
            None if shown.session is not None and shown.session.taken_over else "none"
        )
        self._connect.layout.display = None if "launch" not in shown.can else "none"
        self._connect.disabled = "connect" not in shown.can
        self._launch.disabled = "launch" not in shown.can
        options = [("none", ""), *((_label(s), s.id) for s in shown.sessions)]
        if tuple(options) != tuple(self._choice.options):
            self._choice.unobserve(self._chosen, "value")
            self._choice.options = options
            self._choice.observe(self._chosen, "value")
        self._choice.value = shown.session_id or ""
        self._enable_end()
        progress = shown.progress or (shown.busy.progress if shown.busy else None)
        self._progress.layout.display = None if progress is not None else "none"
        if progress is not None:
            self._progress.value = 0.0 if progress.done is None else progress.done
            self._progress.description = progress.text[:40]
        self._list.value = self.html(shown)

    def html(self, shown: Snapshot) -> str:
        return table(
            ("current", "id", "name", "where", "tokens", "KV", "pages", "owner"),
            rows_of(shown),
            "no session yet: write a prompt and press Launch, or run %%djinn_run",
            "tokens: present of most · pages: where they lie",
        )
