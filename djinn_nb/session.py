"""One prompt being debugged, as the user holds it: run, step, stop, look, fork, end.

A `Session` is a handle. The session itself lives on the server, outlives this process, and may be
moved by other clients; every control call carries the last stop this handle has shown.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from djinn_nb import checkpoints, recipes
from djinn_nb.branches import Branches
from djinn_nb.captured import Captured, capture
from djinn_nb.checks import flag, real, shown, text_or_none, warn_of_unused, whole
from djinn_nb.client import Client
from djinn_nb.diffs import Diff, diff
from djinn_nb.handles import Breakpoint, Edit
from djinn_nb.lens_tables import lens_frame, read_lens_map
from djinn_nb.logs import Logpoint, lost_records
from djinn_nb.planned import Planned
from djinn_nb.recipes import Recipe
from djinn_nb.residency import Moving
from djinn_nb.selectors import selector
from djinn_nb.stopped import Finished, Stopped
from djinn_nb.waiting import Interrupted, run_until_rest, wait_until_rest
from djinn_nb.watches import places, watched
from kernel_server.protocol import messages as m
from kernel_server.protocol.codec import rebuild_error
from kernel_server.protocol.errors import (
    BadArgument,
    NotFinished,
    NoTokenizer,
    NotStopped,
    RequestError,
    UnknownLocation,
    UnknownSession,
)

if TYPE_CHECKING:
    import pandas as pd

_Handle = TypeVar("_Handle", Breakpoint, Edit)


class Story(list[str]):
    """What happened to a session, one line each; prints as text."""

    def __repr__(self) -> str:
        return "\n".join(self)


class Session(Moving, Planned):
    """A prompt being debugged; made by `server.launch()`, found again by `server.attach(id)`.

    session = server.launch("When Mary and John", max_new_tokens=24)
    session.break_at(20)
    stop = session.continue_()
    """

    def __init__(self, client: Client, info: m.SessionInfo) -> None:
        self.client = client
        self._id = info.id
        self._server = client.identity
        self._first = info
        #: the stop this handle has shown last; the server refuses a call that saw an older one
        self._seen = info.stop_number
        #: the stop from which it runs, or ran last, at our wish
        self._ran_from = info.stop_number if info.status == "running" else None
        self._stop: Stopped | None = None
        #: logpoints that were said to be full
        self._lost: set[int] = set()
        self.client.mirror.update(info)
        # the prompt's ids are shown with their texts, and repr asks nothing
        self.client.learn_texts(info.tokens)

    # -- what is known --------------------------------------------------------------------

    @property
    def id(self) -> str:
        """What the server calls it. Raises UnknownSession when that server has been replaced."""
        if self._is_elsewhere:
            raise UnknownSession(self.client.other_server(self._id))
        return self._id

    @property
    def _is_elsewhere(self) -> bool:
        """Whether another server answers now, which may have a session of the same id."""
        return self.client.identity != self._server

    @property
    def seen(self) -> int:
        """Number of the stop that this handle has shown last."""
        return self._seen

    @property
    def is_taken_over(self) -> bool:
        """Whether somebody else has moved it since this handle showed where it stands.

        Asks nothing. `session.stop` looks again; until then a control call gets StaleStop.
        """
        seen = self._seen  # read first: it never runs ahead of what is described
        info = self.newest
        ours = self._ran_from == seen
        if info.status == "running":
            return not (ours and info.stop_number == seen)
        return info.stop_number not in (seen, seen + ours)  # what was asked may not have begun

    @property
    def newest(self) -> m.SessionInfo:
        """The newest description that has come here; `refresh()` asks for one."""
        if self._is_elsewhere:
            return self._first
        return self.client.mirror.newest(self._id) or self._first

    def refresh(self) -> m.SessionInfo:
        """Ask the server how the session is now."""
        return self.client.describe(self.id)

    def refreshed(self, handle: _Handle) -> _Handle:
        """The handle, after a look at the server."""
        if not self.client.mirror.is_gone(self.id):
            self.refresh()
        return handle

    @property
    def name(self) -> str:
        """What it is called in tables: the name it was given, else its id; a fork says of what."""
        return self._first.name

    @property
    def seed(self) -> int:
        """The seed of its sampler: the same seed gives the same tokens."""
        return self._first.seed

    @property
    def parent(self) -> str | None:
        """Id of the session it was forked from."""
        return self._first.parent

    @property
    def status(self) -> str:
        """`waiting`, `running`, `stopped`, `finished` or `failed`."""
        return self.refresh().status

    @property
    def forward(self) -> int:
        """The current forward: 0 is the prefill, forward k yields generated token k."""
        return self.refresh().forward

    @property
    def location(self) -> str | None:
        """The location last reached in this forward; None before the first."""
        return self.refresh().location

    @property
    def layers_executed(self) -> int:
        """Distinct layers finished in the current forward."""
        return self.refresh().layers_executed

    @property
    def tokens(self) -> list[int]:
        """Token ids so far, prompt included."""
        return list(self.refresh().tokens)

    @property
    def text(self) -> str:
        """Prompt and continuation so far, without special tokens.

        Raises NoTokenizer when the model has none.
        """
        if not self.client.model.has_tokenizer:
            raise NoTokenizer(
                f"{self.client.model.name} has no tokenizer, so tokens have no text:"
                " session.tokens has their ids"
            )
        return self.client.text_of(self.refresh().tokens)

    @property
    def logits(self) -> npt.NDArray[np.float32] | None:
        """Logits of the last finished forward's last token, `[vocabulary]`; None before the first.

        float32, whatever the model's dtype. A forward is finished once its token is sampled: at a
        stop at `logits`, `stop.value` holds this forward's.
        """
        try:
            found = self.client.read_tensor(m.ReadLogits(session_id=self.id), "logits")
        except NotFinished:
            return None
        return found.astype(np.float32, copy=False).reshape(-1)

    def story(self) -> Story:
        """The events, moves and instructions of this session, as the server kept them."""
        return Story(self.client.call(m.ReadStory(session_id=self.id), m.StoryReply).lines)

    # -- breakpoints and edits ------------------------------------------------------------

    def break_at(
        self,
        location: int | str,
        *,
        when: str = "any",
        condition: str | None = None,
        ignore: int = 0,
        once: bool = False,
    ) -> Breakpoint:
        """Stop when a forward reaches `location`: a layer number, or a name.

        when: "prefill", "decode" or "any". condition: judged for each token fed, such as
        'token == " to" and norm > 30'; names: token, token_id, position, forward, hits, norm (L2),
        num_nan, num_inf; of the logit lens there (the true logits at "logits"), each at the price
        of the model's head: top_token, top_token_changed, entropy (nats), prob(" Mary"); and
        cosine("joy") with a named vector, as it is now.
        ignore: let the first so many pass. once: disabled after its first stop.

        Raises UnknownLocation, BadCondition (a caret shows where), BadArgument.

            session.break_at(20)
            session.break_at("layers.3.input", when="decode", ignore=2)
        """
        message = m.SetBreakpoint(
            session_id=self.id,
            locations=(location_name(location),),
            when=_when(when),
            condition=_condition(condition),
            ignore=whole(ignore, "ignore", least=0),
            once=flag(once, "once"),
        )
        made = self.client.call(message, m.BreakpointReply).breakpoint
        self.refresh()
        return Breakpoint(self, made)

    def break_when(
        self,
        *,
        nan: bool = False,
        inf: bool = False,
        norm_above: float | None = None,
        top_token: str | None = None,
        top_token_changes: bool = False,
        entropy_above: float | None = None,
        entropy_below: float | None = None,
        cosine_above: tuple[str, float] | None = None,
        condition: str | None = None,
        at: object = "every layer",
        when: str = "any",
        tokens: object = "all",
        ignore: int = 0,
        once: bool = False,
    ) -> Breakpoint:
        """Stop wherever a value is what is watched for: a data breakpoint.

        Exactly one of: nan, inf (an element is); norm_above (L2 of a token's vector); of the logit
        lens top_token (a text), top_token_changes (from one location to the next, same token),
        entropy_above and entropy_below (nats); cosine_above: name of a vector and a number; or a
        condition as in `break_at`. at: "every layer" (its output), "every site", a location or a
        list. tokens: positions, "prompt", "generated" or a text; the others are not judged.
        ignore, once: over all locations together. What the lens reads costs the model's head at
        each location; a norm or a NaN next to nothing.

        Raises BadArgument, BadCondition, UnknownLocation, UnknownVector.

            session.break_when(nan=True)
            session.break_when(top_token=" Mary", tokens=-1, at=range(10, 20))
            session.continue_().location
        """
        watches = {
            "nan": nan,
            "inf": inf,
            "norm_above": norm_above,
            "top_token": top_token,
            "top_token_changes": top_token_changes,
            "entropy_above": entropy_above,
            "entropy_below": entropy_below,
            "cosine_above": cosine_above,
        }
        condition = watched(watches, condition)
        message = m.SetBreakpoint(
            session_id=self.id,
            locations=places(at, condition, self.client.model),
            kind="data breakpoint",
            when=_when(when),
            condition=condition,
            ignore=whole(ignore, "ignore", least=0),
            once=flag(once, "once"),
            tokens=selector(tokens),
        )
        made = self.client.call(message, m.BreakpointReply).breakpoint
        self.refresh()
        return Breakpoint(self, made)

    def log_at(
        self,
        locations: object,
        *,
        what: str = "summary",
        tokens: object = "all",
        condition: str | None = None,
        when: str = "any",
        max_bytes: int = 16 << 20,
        on_full: str = "drop",
    ) -> Logpoint:
        """Note what is at these locations each time they are reached, without stopping.

        locations: a layer number, a name, a list, "every layer" or "every site". what: "summary"
        (norm, largest magnitude and NaN count per token) or "tensor" (the values too, in the
        model's dtype). tokens: which are noted; with a condition, those at which it holds.
        max_bytes: of the server's memory; when they are full new records are dropped and counted,
        or, with on_full="stop", the session stops with the reason "exception".

        A value is noted as it is when it is reached: an edit made at a stop there comes after it.
        Records outlive this client, and end with the session. Raises UnknownLocation,
        BadCondition, BadArgument.

            log = session.log_at([3, 7], what="tensor", tokens=-1)
            session.continue_()
            log.frame(), log.tensors()["layers.3.output"].values
        """
        if what not in ("summary", "tensor"):
            raise BadArgument(f"what is 'summary' or 'tensor', not {shown(what)}")
        if on_full not in ("drop", "stop"):
            raise BadArgument(f"on_full is 'drop' or 'stop', not {shown(on_full)}")
        message = m.SetBreakpoint(
            session_id=self.id,
            locations=places(locations, _condition(condition), self.client.model),
            kind="logpoint",
            when=_when(when),
            condition=_condition(condition),
            what=what,  # type: ignore[arg-type]
            tokens=selector(tokens),
            max_bytes=whole(max_bytes, "max_bytes", least=1),
            on_full=on_full,  # type: ignore[arg-type]
        )
        made = self.client.call(message, m.BreakpointReply).breakpoint
        self.refresh()
        return Logpoint(self, made)

    @property
    def breakpoints(self) -> list[Breakpoint]:
        """Its breakpoints, data breakpoints and logpoints, in the order made."""
        return [
            Logpoint(self, info) if info.kind == "logpoint" else Breakpoint(self, info)
            for info in self.refresh().breakpoints
        ]

    def warn_of_lost_records(self, logpoint_id: int, dropped: int) -> None:
        """Say once of each logpoint that its log was full."""
        if dropped and logpoint_id not in self._lost:
            self._lost.add(logpoint_id)
            lost_records(self._id, logpoint_id, dropped)

    @property
    def edits(self) -> list[Edit]:
        """Its edits, in the order made, which is the order they apply in."""
        return [Edit(self, info) for info in self.refresh().edits]

    def edit_call(self, message: Any) -> m.EditReply:
        """Send a request about edits; values read before are out of date afterwards."""
        reply = self.client.call(message, m.EditReply)
        self.client.mirror.values_changed(self.id)
        self.refresh()
        return reply

    # -- running --------------------------------------------------------------------------

    def continue_(self, timeout: float | None = None) -> Stopped | Finished:
        """Run on until something stops the session, or it finishes.

        timeout: seconds to wait; then StillRunning is raised and the session runs on. An interrupt
        likewise ends the waiting only: `wait()` waits on, `pause()` stops the session.

        Raises StaleStop when another client has moved the session, SessionFailed when the model
        failed, OutOfPages when there is no room.

            stop = session.continue_()
            if isinstance(stop, Stopped): ...
        """
        return self._run(m.Continue(session_id=self.id, seen=self._seen), timeout)

    def next(self, timeout: float | None = None) -> Stopped | Finished:
        """Run to the next layer's output; past the last layer to `final_norm`, then `logits`."""
        return self._run(m.Next(session_id=self.id, seen=self._seen), timeout)

    def step_in(self, timeout: float | None = None) -> Stopped | Finished:
        """Run to the next site: inside the layer, or at its end.

        Sites are those of `server.model.sites`. Going on from inside a layer runs the layer again
        from its input, with its edits; `session.newest.layers_replayed` counts that.

            stop = session.step_in()
            stop.value                              # [tokens, heads, head_dim], say
            session.step_in().location
        """
        return self._run(m.StepIn(session_id=self.id, seen=self._seen), timeout)

    def step_out(self, timeout: float | None = None) -> Stopped | Finished:
        """Run to this forward's `logits`, before the next token is sampled."""
        return self._run(m.StepOut(session_id=self.id, seen=self._seen), timeout)

    def run_to(self, location: int | str, timeout: float | None = None) -> Stopped | Finished:
        """Run until `location` is reached next, in this forward or a later one."""
        message = m.RunTo(session_id=self.id, seen=self._seen, location=location_name(location))
        found = self._run(message, timeout)
        if isinstance(found, Finished):
            found._notes.append(f"run_to({location!r}) was never reached: the run ended before it")
        return found

    # -- going back -----------------------------------------------------------------------

    def step_back(self, timeout: float | None = None) -> Stopped | Finished:
        """Return to the previous stop: its tokens, place, edits and values, bit for bit.

        Breakpoints and logs stay as they are. What lay ahead stays in `branches()`. Raises
        BadArgument at the first stop, NotStopped while it runs, QuotaExceeded.

            session.continue_()
            session.step_back().edit(scale=0.5)
        """
        return self._run(m.StepBack(session_id=self.id, seen=self._seen), timeout)

    def rewind(
        self, forward: int, location: int | str, timeout: float | None = None
    ) -> Stopped | Finished:
        """Return to any place the session has passed, whether or not it stopped there.

        Where it did not stop, the forward is run again from its start, or from a stop before, with
        the edits of that time; no breakpoint counts on that way. Raises BadArgument for a place not
        passed, UnknownLocation, OutOfPages.

            session.rewind(0, "layers.3.output")
        """
        message = m.Rewind(
            session_id=self.id,
            seen=self._seen,
            forward=whole(forward, "forward", least=0),
            location=location_name(location),
        )
        return self._run(message, timeout)

    def branches(self) -> Branches:
        """Where the session stood, as a tree: stops, ends, and what came after each."""
        return Branches(self.client.call(m.ListBranches(session_id=self.id), m.Branches))

    def go_to(self, node: int | Stopped, timeout: float | None = None) -> Stopped | Finished | None:
        """Return to a node of `branches()`, or to a stop seen before; None at the start.

        Raises UnknownNode, and what `step_back()` raises.

            first = session.continue_()
            session.continue_()
            session.go_to(first)
        """
        number = node.number if isinstance(node, Stopped) else whole(node, "node", least=0)
        message = m.GoTo(session_id=self.id, seen=self._seen, node=number)
        info = self._rested(message, timeout)
        if info.status == "waiting" and info.error is None:
            self.client.mirror.update(info)
            self._seen = info.stop_number
            return None
        return self._arrived(info)

    def diff(
        self, one: object, other: object = None, *, tokens: object = "all", lens: bool = True
    ) -> Diff:
        """How two places differ, by layer and token, and where they part first; changes nothing.

        one, other: a node (its number, or one of `branches()`), a stop or an end, of this session
        or of another one here, or a session where it stands; None is where this session stands.
        tokens: a selector as of `stop.edit`. lens: with the KL of the logit lens, at the price of
        the model's head where bits differ.

        What differs is run again on two scratch forks, with the edits and tokens of then; prompts
        that differ are compared position by position. Raises UnknownNode, NotStopped while one
        runs, NotFinished where nothing is computed, WrongModel and NotSupported for sessions of two
        servers, QuotaExceeded for too many tokens at once.

            plain = session.continue_()
            session.rewind(0, 5).edit(scale=0.5, tokens=-1)
            session.diff(plain, session.continue_()).first_divergence
        """
        return diff(self, one, self if other is None else other, tokens, lens)

    def prune(self, node: int) -> Branches:
        """Free a node and all that came after it; returns what is left.

        Raises UnknownNode, BadArgument for a node that the session has come by.
        """
        message = m.PruneBranch(session_id=self.id, node=whole(node, "node", least=0))
        return Branches(self.client.call(message, m.Branches))

    def pause(self) -> Stopped | Finished:
        """Stop at the next layer boundary, and wait for it; a session at rest is left alone."""
        info = self.client.control(m.Pause(session_id=self.id))
        if info.status == "running":
            info = wait_until_rest(self.client, self.id, timeout_s=None, name=self._label)
        return self._arrived(info)

    def wait(self, timeout: float | None = None) -> Stopped | Finished:
        """Wait until the session rests, without making it run; at rest, where it stands."""
        info = wait_until_rest(self.client, self.id, timeout_s=timeout, name=self._label)
        return self._arrived(info)

    @property
    def stop(self) -> Stopped | None:
        """The stop it stands at now; None when it is not stopped.

        Reading it takes note of where other clients have moved the session.
        """
        info = self.refresh()
        if info.status != "stopped":
            self._seen = info.stop_number
            return None
        found = self._arrived(info)
        return found if isinstance(found, Stopped) else None

    def capture(self, locations: object, what: str = "summary", tokens: object = "all") -> Captured:
        """Values at any locations of the forward it stands in, recomputed on a scratch fork.

        locations: a layer number, a name, or a list of them; also those not reached yet. what:
        "summary" gives a `Summary` each, "tensor" float32 arrays `[tokens, channels]`, or `[tokens,
        heads, channels]` at a site with heads. tokens: a selector as of `stop.edit`.

        The session's edits are made again on the way; nothing is changed. Raises NotStopped,
        UnknownLocation, NotSupported, BadSelector, QuotaExceeded for more than the server gives.

            session.capture(range(24)).frame()
            session.capture("layers.9.attention.heads", what="tensor", tokens=-1)
            session.capture(["layers.3.middle", "logits"])["logits"].maximum
        """
        return capture(self, self._seen, locations, what, tokens)

    def lens(self, locations: object, tokens: object = "all", top_k: int = 1) -> pd.DataFrame:
        """Logit lens at any locations of the forward it stands in, recomputed on a scratch fork.

        locations: a layer number, a name, or a list of them, of the residual stream or what is
        added to it; also those not reached yet. tokens: a selector as of `stop.edit`.

        Returns one row per (location, token, rank), as `stop.lens()` does. Nothing is changed.
        Raises NotStopped, UnknownLocation, NotSupported, BadSelector, QuotaExceeded for more than
        4,096 places at once.

            table = session.lens(range(24), tokens=slice(-8, None))
            table.pivot(index="location", columns="position", values="text")
            session.lens(["layers.9.middle", 9], tokens=" John", top_k=3)
        """
        return lens_frame(read_lens_map(self, self._seen, locations, tokens, top_k))

    def fork(
        self,
        seed: int | None = None,
        *,
        name: str | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        max_new_tokens: int | None = None,
    ) -> Session:
        """A copy of it as it stands; pages are shared until one of the two writes them.

        seed, temperature, top_p, max_new_tokens: for the copy, instead of this session's; the
        tokens generated already count. Raises NotStopped while it runs, BadArgument, QuotaExceeded.

            child = session.fork(seed=7)
            child = session.fork(seed=7, temperature=1.0, max_new_tokens=40)
        """
        message = m.Fork(
            session_id=self.id,
            seed=None if seed is None else whole(seed, "seed", least=0),
            name=text_or_none(name, "name"),
            temperature=None if temperature is None else real(temperature, "temperature"),
            top_p=None if top_p is None else real(top_p, "top_p"),
            max_new_tokens=(
                None if max_new_tokens is None else whole(max_new_tokens, "max_new_tokens")
            ),
        )
        try:
            made = Session(self.client, self.client.control(message))
        except KeyboardInterrupt:
            raise Interrupted(
                f"the fork of {self._label} may have been made: server.sessions() lists it,"
                " server.attach(id) gives it"
            ) from None
        warn_of_unused(made.newest.temperature, seed=seed, top_p=top_p)
        return made

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save it as a checkpoint: a folder at `path` on this machine; returns it.

        All that determines it, with its branches, breakpoints and the numbers of its edits, as JSON
        and safetensors; no keys and values, which are computed again where it is loaded. Written in
        one step, owner only. Raises NotStopped while it runs, BadArgument where something exists.

            session.save("mary.djinn")
            server.load("mary.djinn").continue_()
        """
        return checkpoints.write(checkpoints.fetch(self), path)

    def recipe(self) -> Recipe:
        """What was done, with a hash of the value at each stop on the way, for others to replay.

        The stops are looked at on a fork; nothing is changed. Raises NotStopped while it runs.

            recipe = session.recipe()
            recipe.save("mary.djinn")
            server.replay("mary.djinn").same
        """
        return recipes.make(self)

    def terminate(self) -> None:
        """End it and free what it holds; its handle then knows only what it has shown."""
        self.client.call(m.Terminate(session_id=self.id), m.Terminated)
        self.client.mirror.take(m.Event(seq=0, kind="terminated", session_id=self.id))

    # -- inside ---------------------------------------------------------------------------

    @property
    def _label(self) -> str:
        named = f" ({self.name})" if self.name not in ("", self._id) else ""
        return f"session {self._id}{named}"

    def _run(self, message: Any, timeout: float | None) -> Stopped | Finished:
        return self._arrived(self._rested(message, timeout))

    def _rested(self, message: Any, timeout: float | None) -> m.SessionInfo:
        self._ran_from = self._seen
        try:
            return run_until_rest(self.client, message, timeout_s=timeout, name=self._label)
        except RequestError:  # refused: it was not moved
            self._ran_from = None
            raise

    def _arrived(self, info: m.SessionInfo) -> Stopped | Finished:
        """What a description of a session at rest means for the user."""
        self.client.mirror.update(info)
        for point in info.breakpoints:
            self.warn_of_lost_records(point.id, point.dropped)
        self._seen = info.stop_number
        if info.status == "finished":
            return Finished(self, info)
        if info.status == "stopped" and info.stop is not None:
            if self._stop is None or self._stop.number != info.stop.number:
                self._stop = Stopped(self, info)
            return self._stop
        if info.error is not None:
            raise rebuild_error(info.error)
        if info.status == "waiting":
            raise NotStopped(f"{self._label} has not been started: continue_() runs it")
        raise UnknownSession(f"{self._label} is {info.status}: look at it with attach()")

    def __repr__(self) -> str:
        from djinn_nb.lines import session_text

        if self._is_elsewhere:
            return f"{self._label}: {self.client.transport.address} is another server now"
        texts = self.client.token_texts(self._first.tokens)
        gone = self.client.mirror.is_gone(self._id)
        return session_text(self.client.model, self.newest, texts, terminated=gone)


# -- arguments ----------------------------------------------------------------------------------


def location_name(location: object) -> str:
    """A location as text for the server to parse, which knows the model."""
    if isinstance(location, (bool, np.bool_)) or not isinstance(location, (int, str, np.integer)):
        raise UnknownLocation(
            "a location is a layer number or a name such as 'layers.20.output', not"
            f" {shown(location)}"
        )
    return str(location)


def _when(when: object) -> m.When:
    if when not in ("any", "prefill", "decode"):
        raise BadArgument(f"when is 'any', 'prefill' or 'decode', not {shown(when)}")
    return when


def _condition(condition: object) -> str | None:
    if condition is not None and not isinstance(condition, str):
        raise BadArgument(
            f"a condition is a text such as 'norm > 30', not a {type(condition).__name__}"
        )
    return condition
