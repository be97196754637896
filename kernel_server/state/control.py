"""Requests that make, move and end sessions, and those about breakpoints. Each is refused whole,
with nothing changed, or done. What the engine makes of it is decided in `running`.
"""

from __future__ import annotations

import math

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import (
    BadArgument,
    BadPrompt,
    NotStopped,
    PromptTooLong,
    QuotaExceeded,
)
from kernel_server.protocol.location import NOT_STARTED, is_inner
from kernel_server.state.events import Requested
from kernel_server.state.instructions import DropLog, ForkTensors, ReadTensors
from kernel_server.state.leaving import FLAGS
from kernel_server.state.running import Running
from kernel_server.state.sessions import Session
from kernel_server.state.stepping import (
    Target,
    entry,
    next_target,
    run_to_target,
    step_in_target,
    step_out_target,
)
from kernel_server.state.story import brief
from kernel_server.state.tensor_bytes import history_bytes, session_bytes, standing_bytes

MAX_SEED = 2**63


class Control(Running):
    """Launch, continue and stepping, pause, fork, terminate, breakpoints."""

    # -- making ---------------------------------------------------------------------------------

    def launch(self, event: Requested, request: m.Launch) -> None:
        prompt = self._checked_prompt(request)
        self._check_sampling(request.temperature, request.top_p)
        self._check_seed(request.seed)
        self._check_name(request.name)
        self._check_quota(event.owner)
        need = session_bytes(self.shape, len(prompt), request.max_new_tokens)
        self.require_tensors(need, f"a prompt of {len(prompt)} tokens")
        number = self.num_made = self.num_made + 1
        session = Session(
            id=f"s{number}",
            owner=event.owner,
            name=request.name or f"s{number}",
            parent=None,
            tokens=list(prompt),
            prompt=prompt,
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            # no randomness here: the number of the session is as good a seed, and reproducible
            seed=number if request.seed is None else request.seed,
            tables=[()] * self.shape.num_groups,
            touched=self.now,
            fingerprint=self.fingerprint,
        )
        self.sessions[session.id] = session
        self.note(session, "Launch", brief(request))
        if request.stop_on_entry:
            session.target = entry()
            self.set_running(session)
        self.keep_to_room()
        self.publish(session, "launched")
        self.reply(event.request_id, m.SessionReply(session=self.info(session)))

    def _checked_prompt(self, request: m.Launch) -> tuple[int, ...]:
        shape, prompt, new = self.shape, request.token_ids, request.max_new_tokens
        if not prompt:
            raise BadPrompt("the prompt is empty: give at least one token")
        if type(new) is not int or new < 1:
            raise BadArgument(f"max_new_tokens is {new!r}: give 1 or more")
        self._check_room(len(prompt), new)
        # after the length: what is too long anyway is not looked through while others wait
        for index, token in enumerate(prompt):
            if type(token) is not int or not 0 <= token < shape.vocab_size:
                raise BadPrompt(
                    f"token id {token} at position {index} lies outside the vocabulary, 0 to"
                    f" {shape.vocab_size - 1}"
                )
        return prompt

    def _check_room(self, num_prompt: int, new: int) -> None:
        """Refuse a session that could not finish even alone on this server."""
        shape = self.shape
        if num_prompt + new > shape.max_context:
            left = shape.max_context - num_prompt
            ask = f", or ask for at most {left} new tokens" if left > 0 else ""
            raise PromptTooLong(
                f"{num_prompt} prompt tokens and {new} new ones exceed the model's context of"
                f" {shape.max_context}: shorten the prompt to at most"
                f" {max(shape.max_context - new, 1)} tokens{ask}",
                prompt_tokens=num_prompt,
                max_context=shape.max_context,
            )
        if shape.max_prompt is not None and num_prompt > shape.max_prompt:
            raise PromptTooLong(
                f"{num_prompt} prompt tokens exceed the {shape.max_prompt} whose attention masks"
                " have room: this model is served by the Cache route, which keeps a mask of all"
                f" pairs of prompt tokens; shorten the prompt to at most {shape.max_prompt} tokens",
                prompt_tokens=num_prompt,
                max_prompt=shape.max_prompt,
            )
        pages = shape.num_groups * shape.pages_for(num_prompt + new - 1)
        total, allocated = self.residency.slots["device"].capacity, self.allocated("device")
        if pages > total:
            # a budget that was lowered is the cause only where all that there is would do
            has, more = (
                f"whole pool has {allocated}",
                f"start the server with more {FLAGS['device']}",
            )
            if pages <= allocated:
                has = f"device may hold {total} of {allocated}"
                more = self.more_room("device")
            raise PromptTooLong(
                f"{num_prompt} prompt tokens and {new} new ones need {pages} pages, the {has}: ask"
                f" for less, or {more}",
                needed=pages,
                total=total if pages <= allocated else allocated,
            )
        most = self.pool.per_tenant
        if most is not None and pages > most:
            raise QuotaExceeded(
                f"{num_prompt} prompt tokens and {new} new ones need {pages} pages, one owner may"
                f" have {most}: ask for less, or start the server with more --kv-per-owner",
                needed=pages,
                limit=most,
            )

    def _check_sampling(self, temperature: float, top_p: float) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise BadArgument(f"temperature is {temperature}: give 0 (greedy) or a positive number")
        if not 0 < top_p <= 1:
            raise BadArgument(f"top_p is {top_p}: give a number above 0, at most 1")

    def _check_seed(self, seed: int | None) -> None:
        if seed is not None and (type(seed) is not int or not 0 <= seed < MAX_SEED):
            raise BadArgument(f"seed is {seed!r}: give a whole number from 0 to 2**63 - 1")

    def _check_name(self, name: str | None) -> None:
        if name is None:
            return
        most = self.limits.name_length
        if not 1 <= len(name) <= most or not name.isprintable():
            raise BadArgument(
                f"the name has {len(name)} characters: give 1 to {most}, all printable"
            )

    def _check_quota(self, owner: str) -> None:
        most = self.limits.sessions_per_owner
        if len(self.sessions) < most:
            return
        # what finished before a restart holds nothing, and may be many
        have = sum(
            s.owner == owner and not s.scratch and not (s.dormant and s.status == "finished")
            for s in self.sessions.values()
        )
        if have >= most:
            raise QuotaExceeded(
                f"you have {have} sessions, the limit is {most}: terminate one first",
                have=have,
                limit=most,
            )

    def fork(self, event: Requested, request: m.Fork, parent: Session) -> None:
        if parent.status not in ("waiting", "stopped", "finished"):
            place = parent.place(self.shape.num_layers)
            what = "pause it first" if parent.status == "running" else "it holds nothing to copy"
            raise NotStopped(f"session {parent.id} is {place}: {what}", status=parent.status)
        temperature, top_p, max_new_tokens = self._fork_sampling(request, parent)
        self._check_seed(request.seed)
        self._check_name(request.name)
        self._check_quota(event.owner)
        # nothing now, since all is shared; but each of the two may go on
        need = standing_bytes(self.shape, parent)
        if max_new_tokens > parent.max_new_tokens:
            need += history_bytes(self.shape, 1, max_new_tokens)
        self.require_tensors(need, f"a fork of {parent.id}")
        number = self.num_made = self.num_made + 1
        child = Session(
            id=f"s{number}",
            owner=parent.owner,
            name=request.name or f"{parent.name} fork {number}"[-self.limits.name_length :],
            parent=parent.id,
            tokens=parent.share_tokens(),
            tokens_shared=True,
            told=parent.told,
            prompt=parent.prompt,
            prompt_array=parent.prompt_array,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=parent.seed if request.seed is None else request.seed,
            tables=list(parent.tables),
            status=parent.status,
            forward=parent.forward,
            point=parent.point,
            layers_replayed=parent.layers_replayed,
            stop_number=parent.stop_number,
            stop=parent.stop,
            finish_reason=parent.finish_reason,
            error=parent.error,
            touched=self.now,
            breakpoints=parent.breakpoints.copy(),
            edits=parent.edits.copy(),
            tree=parent.tree.of_fork((request.seed, request.temperature, request.top_p)),
            applied=dict(parent.applied),
            fingerprint=parent.fingerprint,
            inexact=parent.inexact,
            counted=parent.counted,
        )
        for table in child.tables:
            self.pool.retain(table)
        self.sessions[child.id] = child
        self.share_kept(child)
        self.note(parent, "Fork", f"to {child.id}")
        self.note(child, "Fork", f"of {parent.id}, {child.place(self.shape.num_layers)}")
        nodes = tuple(child.tree.kept)
        self.emit(ForkTensors(parent_id=parent.id, child_id=child.id, nodes=nodes))
        self.keep_to_room()
        self.publish(child, "launched")
        self.reply(event.request_id, m.SessionReply(session=self.info(child)))

    def _fork_sampling(self, request: m.Fork, parent: Session) -> tuple[float, float, int]:
        """Temperature, top-p and number of new tokens of a fork: the parent's, or those given."""
        temperature = parent.temperature if request.temperature is None else request.temperature
        top_p = parent.top_p if request.top_p is None else request.top_p
        self._check_sampling(temperature, top_p)
        new = request.max_new_tokens
        if new is None:
            return temperature, top_p, parent.max_new_tokens
        done = len(parent.tokens) - len(parent.prompt)
        if parent.status == "finished":
            raise BadArgument(
                f"session {parent.id} is finished after {done} tokens, and so is a fork of it:"
                " leave max_new_tokens out, or fork where it is stopped"
            )
        if type(new) is not int or new <= done:
            raise BadArgument(
                f"max_new_tokens is {new!r}: session {parent.id} has generated {done} tokens"
                f" already, give {done + 1} or more"
            )
        self._check_room(len(parent.prompt), new)
        return temperature, top_p, new

    # -- moving -----------------------------------------------------------------------------

    def continue_(self, event: Requested, request: m.Continue, session: Session) -> None:
        self._require_move(session, request.seen)
        self._run_on(event, session, None)

    def next(self, event: Requested, request: m.Next, session: Session) -> None:
        self._require_move(session, request.seen)
        self._run_on(event, session, next_target(self.shape, session.forward, session.point))

    def step_in(self, event: Requested, request: m.StepIn, session: Session) -> None:
        self._require_move(session, request.seen)
        self._run_on(event, session, step_in_target(self.shape, session.forward, session.point))

    def step_out(self, event: Requested, request: m.StepOut, session: Session) -> None:
        self._require_move(session, request.seen)
        self._run_on(event, session, step_out_target(self.shape, session.forward, session.point))

    def run_to(self, event: Requested, request: m.RunTo, session: Session) -> None:
        self._require_move(session, request.seen)
        wanted = self.shape.point(request.location)
        self._run_on(event, session, run_to_target(session.forward, session.point, wanted))

    def _require_move(self, session: Session, seen: int) -> None:
        """Refuse unless it rests where the caller saw it, or ran on from there by itself until its
        server ended."""
        self.require_rest(session, session.stop_number if seen == session.ran_from else seen)

    def _run_on(self, event: Requested, session: Session, target: Target | None) -> None:
        # found out now, while it can still be refused
        pages = self.writes(session, self.until(session, target)).num_pages
        self.pool.require(pages, session.owner)
        if target is not None and is_inner(target.point):
            self.require_place(session, session.forward, (target.forward, target.point))
        session.target = target
        self.set_running(session)
        self.publish(session, "continued")
        self.reply(event.request_id, m.SessionReply(session=self.told_info(session)))

    def pause(self, event: Requested, request: m.Pause, session: Session) -> None:
        """Stop at the next boundary; a session that does not run is answered as it is."""
        if session.status == "running" and not session.pausing:
            if self.slot is not None and self.slot.session is session:
                session.pausing = True
                self.interrupt()
            elif session.point == NOT_STARTED:
                session.pausing = True  # its next stretch runs to the embedding
            else:
                self.unqueue(session)
                self.stop(session, "pause")
        self.reply(event.request_id, m.SessionReply(session=self.info(session)))

    # -- ending -----------------------------------------------------------------------------

    def terminate(self, event: Requested, request: m.Terminate, session: Session) -> None:
        del self.sessions[session.id]
        self.unqueue(session)
        if self.slot is not None and self.slot.session is session:
            # the engine writes its pages until it has answered
            self.slot.ended = True
            self.interrupt()
        else:
            self.free(session)
        self.publish(session, "terminated")
        self._story.end(session.id)
        self.reply(event.request_id, m.Terminated(session_id=session.id))

    # -- breakpoints ------------------------------------------------------------------------

    def set_breakpoint(self, event: Requested, request: m.SetBreakpoint, session: Session) -> None:
        if session.status in ("finished", "failed"):
            place = session.place(self.shape.num_layers)
            raise NotStopped(
                f"session {session.id} is {place}: no forward will come to a breakpoint",
                status=session.status,
            )
        most = self.limits.breakpoints_per_session
        if len(session.breakpoints) >= most:
            raise QuotaExceeded(
                f"session {session.id} has {most} breakpoints, the limit: remove one first",
                have=most,
                limit=most,
            )
        found = session.breakpoints.add(request, self.shape, len(session.prompt))
        self._breakpoint_changed(event, session, found.info())

    def enable_breakpoint(
        self, event: Requested, request: m.EnableBreakpoint, session: Session
    ) -> None:
        found = session.breakpoints.get(request.breakpoint_id)
        session.breakpoints.enable(found, request.enabled)
        self._breakpoint_changed(event, session, found.info())

    def remove_breakpoint(
        self, event: Requested, request: m.RemoveBreakpoint, session: Session
    ) -> None:
        found = session.breakpoints.get(request.breakpoint_id)
        session.breakpoints.remove(found)
        if found.log is not None:
            self.emit(DropLog(session_id=session.id, breakpoint_id=found.id))
        self._breakpoint_changed(event, session, found.info())

    def _breakpoint_changed(
        self, event: Requested, session: Session, info: m.BreakpointInfo
    ) -> None:
        self.plan_anew(session)
        self.publish(session, "changed")
        self.reply(event.request_id, m.BreakpointReply(breakpoint=info))

    def read_log(self, event: Requested, request: m.ReadLog, session: Session) -> None:
        found = session.breakpoints.get(request.breakpoint_id)
        if found.log is None:
            raise BadArgument(f"{found.kind} {found.id} keeps no log: session.log_at() makes one")
        if session.status == "failed":
            raise NotStopped(
                f"session {session.id} failed and holds nothing any more, its logs included",
                status=session.status,
            )
        if not 0 <= request.after <= found.log.last_seq:
            raise BadArgument(
                f"after is {request.after}: records are numbered 1 to {found.log.last_seq}"
            )
        if request.release:
            found.log.release(request.after)
        self.emit(
            ReadTensors(
                request_id=event.request_id,
                session_id=session.id,
                message=request,
                rows=None,
                channels=None,
                first_token=session.first_token,
                forward=session.forward,
                owner=session.owner,
            )
        )

    # -- asking -----------------------------------------------------------------------------

    def describe(self, event: Requested, request: m.Describe, session: Session) -> None:
        self.reply(event.request_id, m.SessionReply(session=self.info(session)))

    def list_sessions(self, event: Requested, request: m.ListSessions) -> None:
        mine = [s for s in self.sessions.values() if s.owner == event.owner and not s.scratch]
        self.reply(event.request_id, m.Sessions(sessions=tuple(map(self.info, mine))))

    def read_story(self, event: Requested, request: m.ReadStory, session: Session) -> None:
        lines = tuple(self._story.lines(session.id))
        self.reply(event.request_id, m.StoryReply(lines=lines))
