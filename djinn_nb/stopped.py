"""What a run ends in: `Stopped`, with the values there, or `Finished`.

A stop is a snapshot: it says where the session stood, and everything it asks the server for carries
the number of that stop, so once the session has moved on it gets StaleStop instead of other values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from djinn_nb.checks import shown, whole
from djinn_nb.client import COMPUTE_S
from djinn_nb.continuations import Continuing
from djinn_nb.edits import Editing
from djinn_nb.lens_tables import lens_frame
from djinn_nb.looking import Looking
from djinn_nb.planned import PLANNED, Planned
from djinn_nb.selectors import selector
from djinn_nb.sites import axes_at, is_added, is_residual, shape_at
from djinn_nb.variables import Source, Variable
from kernel_server.protocol import messages as m
from kernel_server.protocol.codec import rebuild_error
from kernel_server.protocol.errors import (
    BadArgument,
    DjinnError,
    NotStopped,
    NotSupported,
    UnknownLocation,
    UnknownSession,
)
from kernel_server.protocol.location import final_norm_point, is_inner, parse_location

if TYPE_CHECKING:
    import pandas as pd

    from djinn_nb.diffs import Diff
    from djinn_nb.session import Session
    from djinn_nb.view import StopView


class Token(NamedTuple):
    """A token of the session: absolute position, id, and its text (empty without a tokenizer)."""

    position: int
    id: int
    text: str


class Stopped(Editing, Continuing, Looking, Planned):
    """Where a session stands, and the values there; returned by `continue_()` and the steps.

    stop = session.continue_()
    stop.hidden_states[-1].numpy()          # [hidden]
    stop.lens(top_k=5)
    stop.edit(scale=0.9, tokens=-1)
    """

    def __init__(self, session: Session, info: m.SessionInfo) -> None:
        assert info.stop is not None
        self.session = session
        self._info = info
        self._stop = info.stop
        self._texts = session.client.token_texts(self._ids)
        self._variable: Variable | None = None
        self._view: tuple[int, StopView] | None = None

    # -- where it stands ------------------------------------------------------------------

    @property
    def number(self) -> int:
        """Stops are counted per session; a control call carries the number of the stop it saw."""
        return self._stop.number

    @property
    def location(self) -> str:
        """The canonical name, such as `layers.20.output`."""
        return self._stop.location

    @property
    def reason(self) -> str:
        """`entry`, `breakpoint`, `data breakpoint`, `step`, `pause` or `exception`."""
        return self._stop.reason

    @property
    def forward(self) -> int:
        """0 is the prefill; forward k yields generated token k."""
        return self._stop.forward

    @property
    def layers_executed(self) -> int:
        """Distinct layers finished in this forward; what comes after has not run."""
        return self._stop.layers_executed

    @property
    def hit_tokens(self) -> list[int]:
        """Absolute positions of the tokens at which a breakpoint held."""
        return list(self._stop.hit_tokens)

    @property
    def hit_breakpoints(self) -> list[int]:
        """Ids of the breakpoints that stopped the session here."""
        return list(self._stop.hit_breakpoints)

    @property
    def tokens(self) -> list[Token]:
        """The tokens fed in this forward: the prompt in forward 0, one token later."""
        first = self._stop.first_token
        return [
            Token(first + i, token_id, text)
            for i, (token_id, text) in enumerate(zip(self._ids, self._texts, strict=True))
        ]

    @property
    def error(self) -> DjinnError | None:
        """What went wrong, at a stop for the reason `exception`."""
        return rebuild_error(self._stop.error) if self._stop.error is not None else None

    @property
    def _ids(self) -> tuple[int, ...]:
        return self._info.tokens[self._stop.first_token : self._stop.end_token]

    # -- the values -----------------------------------------------------------------------

    @property
    def value(self) -> Variable:
        """The tensor here: `[tokens, hidden]`; `[tokens, heads, head_dim]` at a site with heads,
        `[tokens, heads, keys]` at attention weights, `[1, vocabulary]` at `logits`."""
        if self._variable is None:
            first = self._stop.first_token
            if self.location == "logits":
                first = self._stop.end_token - 1  # the last token's row only
            texts = self._texts[first - self._stop.first_token :]
            source = Source(
                session=self.session,
                seen=self.number,
                location=self.location,
                first_token=first,
                texts=lambda: texts,
                axes=axes_at(self.session.client.model, self.location),
            )
            self._variable = Variable(source)
        return self._variable

    @property
    def hidden_states(self) -> Variable:
        """The residual stream here, `[tokens, hidden]`: a summary until you ask for elements.

        Raises NotSupported where the tensor is another; `value` is the tensor here everywhere.
        """
        model = self.session.client.model
        added = is_added(self.location, model.num_layers)
        if added or not is_residual(self.location, model.num_layers):
            instead = "stop one step earlier, at 'final_norm', for hidden states"
            if self.location != "logits":
                layer = ".".join(self.location.split(".")[:2])
                instead = f"session.run_to('{layer}.output') goes on to hidden states"
            what = shape_at(model, self.location)
            if added:
                what = f"what is added to the residual stream, {what}"
            raise NotSupported(
                f"stopped at {self.location}: the tensor here is {what}, use stop.value; {instead}"
            )
        return self.value

    def lens(
        self, top_k: int = 5, tokens: object = -1, layers: str | Iterable[int] | None = None
    ) -> pd.DataFrame:
        """Logit lens: which tokens the model's final norm and head read off the residual stream.

        layers: None reads the tensor here, for `tokens` (absolute positions, negative from the
        end, or any selector). "all", or a list of layer numbers and names such as "embedding",
        reads those points of this forward that have been reached, for the last token fed.

        Returns one row per (place, rank): location, position, rank, token_id, text, probability,
        entropy_nats. `session.lens()` reads any locations for any tokens.
        Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).

            stop.lens(top_k=3)
            stop.lens(layers="all", top_k=1)[["location", "text", "probability"]]
        """
        reply = self._lens(top_k, tokens, layers)
        here = [self.location] * len(reply.rows) if layers is None else None
        return lens_frame(reply, here)

    def _lens(self, top_k: int, tokens: object, layers: str | Iterable[int] | None) -> m.LensReply:
        top_k = whole(top_k, "top_k", least=1)
        every = layers == "all" if isinstance(layers, str) else False
        if isinstance(layers, str) and not every:
            raise BadArgument(
                f"layers is None, 'all' or a list of layer numbers, not {shown(layers)}"
            )
        if layers is not None and selector(tokens) != selector(-1):
            raise BadArgument("the lens over layers reads the last token fed: leave tokens at -1")
        numbers = None
        if layers is not None and not isinstance(layers, str):
            numbers = _layer_numbers(layers, self.session.client.model.num_layers)
        message = m.ReadLens(
            session_id=self.session.id,
            seen=self.number,
            top_k=top_k,
            tokens=selector(tokens),
            layers=numbers,
            every_layer=every,
        )
        return self.session.client.call(message, m.LensReply, timeout_s=COMPUTE_S)

    def diff(self, other: object, *, tokens: object = "all", lens: bool = True) -> Diff:
        """How another place differs from this stop, by layer and token: see `session.diff()`.

        other: a node of this session, a stop, an end, or a session where it stands. A stop that the
        session has left counts as it was when it was left.

            other = session.fork().continue_()
            stop.diff(other).first_divergence
            stop.diff(other).plot("kl")
        """
        return self.session.diff(self, other, tokens=tokens, lens=lens)

    # -- how it shows itself --------------------------------------------------------------

    def view(self) -> StopView:
        """All that a display of this stop needs, fetched once and again after an edit."""
        from djinn_nb.view import stop_view

        version = self.session.client.mirror.values_version(self.session.id)
        if self._view is None or self._view[0] != version:
            self._view = (version, stop_view(self))
        return self._view[1]

    def show(self) -> None:
        """Display it: tokens, where it stands, norms and lens; as text outside a notebook."""
        from djinn_nb.display import show_stop

        show_stop(self)

    def __repr__(self) -> str:
        """In words, from what is known here."""
        from djinn_nb.lines import stop_line, stop_text

        if self._view is not None and self._is_current(self._view[0]):
            return stop_text(self._view[1])
        return stop_line(self.session.client.model, self._info, self._texts)

    def _is_current(self, version: int) -> bool:
        """Whether no edit has changed since then what a view shows."""
        try:
            newest = self.session.client.mirror.values_version(self.session.id)
        except UnknownSession:  # another server answers there: what was seen is all there is
            return True
        return newest == version

    def _repr_html_(self) -> str:
        from djinn_nb.display import stop_html, text_html

        try:
            view = self.view()
        except DjinnError as error:  # it has moved on, or the server is gone: say what is known
            return text_html(f"{self!r}\n  {error}")
        return stop_html(view)


class Finished:
    """A generation that has come to its end.

    end = session.continue_()
    end.text, end.finish_reason
    """

    def __init__(self, session: Session, info: m.SessionInfo) -> None:
        self.session = session
        self._info = info
        ids, prompt_length = info.tokens, info.num_prompt_tokens
        self._text = session.client.text_of(ids)
        prompt = session.client.text_of(ids[:prompt_length])
        if self._text.startswith(prompt):
            self._parts = (prompt, self._text[len(prompt) :])
        else:  # the prompt's last token and the first one generated spell one character
            self._parts = (prompt, session.client.text_of(ids[prompt_length:]))
        #: what the call that ended here has to say
        self._notes: list[str] = []

    @property
    def number(self) -> int:
        """Number of the stop, of the session's own, that this end is."""
        return self._info.stop_number

    def diff(self, other: object, *, tokens: object = "all", lens: bool = True) -> Diff:
        """How another run differs from this one, by layer and token: see `session.diff()`.

        end.diff(session.step_back()).first_divergence
        """
        return self.session.diff(self, other, tokens=tokens, lens=lens)

    @property
    def tokens(self) -> list[int]:
        """Token ids, prompt included."""
        return list(self._info.tokens)

    @property
    def generated_tokens(self) -> list[int]:
        """Ids of the generated tokens."""
        return list(self._info.tokens[self._info.num_prompt_tokens :])

    @property
    def text(self) -> str:
        """Prompt and continuation, without special tokens; empty without a tokenizer."""
        return self._text

    @property
    def generated_text(self) -> str:
        """The continuation alone; empty without a tokenizer."""
        return self._parts[1]

    @property
    def finish_reason(self) -> str:
        """`eos` or `max_new_tokens`."""
        return self._info.finish_reason or ""

    # hidden from type checkers, which are to go on reporting names that are not here
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            if not name.startswith("_") and (hasattr(Stopped, name) or name in PLANNED["Stopped"]):
                raise NotStopped(
                    f"session {self.session.id} is finished after {len(self.generated_tokens)}"
                    f" tokens, so there is no .{name} here: session.step_back() or session.rewind()"
                    " goes back, or launch again with a breakpoint"
                )
            raise AttributeError(f"'Finished' object has no attribute {name!r}")

    def __repr__(self) -> str:
        from djinn_nb.lines import finished_text

        return finished_text(self.session.client.model, self._info, self._parts, self._notes)

    def _repr_html_(self) -> str:
        from djinn_nb.display import finished_html

        return finished_html(self.session.client.model, self._info, self._parts, self._notes)


def _layer_numbers(layers: Iterable[Any], num_layers: int) -> tuple[int, ...]:
    """The layers of locations as `break_at` reads them; on the wire -1 is the embedding."""
    try:
        wanted = [one if isinstance(one, str) else whole(one, "a layer") for one in layers]
    except (TypeError, BadArgument):
        raise UnknownLocation(
            f"layers is None, 'all' or a list of layer numbers, not {shown(layers)}"
        ) from None
    points = {one: parse_location(one, num_layers).point(num_layers) for one in set(wanted)}
    if any(is_inner(point) or point >= final_norm_point(num_layers) for point in points.values()):
        raise UnknownLocation(
            f"layers holds the embedding and the outputs of layers 0 to {num_layers - 1}: stop at"
            " final_norm or logits, and leave layers out, to read it there"
        )
    return tuple(int(points[one]) - 1 for one in wanted)
