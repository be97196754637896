"""What must hold when sessions go back, whatever the device."""

from __future__ import annotations

import dataclasses
import random

import numpy as np

from djinn_nb import Finished, Session, Stopped
from kernel_server.protocol import messages as m
from notebooks.harness.exactness import Prompt, Trace, different, reference_run, watching
from notebooks.harness.inprocess import Local
from tests.kernel.cases import prompt_of
from tests.kernel.tier_cases import ask


def references_of(local: Local, prompts: list[Prompt]) -> list[Trace]:
    with watching(local) as watch:
        return [reference_run(local, watch, prompt) for prompt in prompts]


def ends_as(session: Session, prompt: Prompt, reference: Trace) -> None:
    """Continue to the end, which must be the reference's, bit for bit."""
    for point in session.breakpoints:
        point.remove()
    if session.status != "finished":
        assert isinstance(session.continue_(), Finished)
    assert tuple(session.tokens[len(prompt.ids) :]) == reference.tokens
    assert different(session.logits, reference.last) == 0


def keep(local: Local, **limits: int) -> None:
    state = local.kernel.state
    state.limits = dataclasses.replace(state.limits, **limits)


def a_stop_returned_to_is_the_same(local: Local) -> None:
    """Value, capture, logits and lens at a stop are the same bits after going back to it."""
    prompt = prompt_of(local, 1.4, new_tokens=5)
    (reference,) = references_of(local, [prompt])
    for kept in (256, 0):
        keep(local, kept_stops_per_session=kept)
        session = prompt.launch(local)
        seen = []
        for place in ("layers.1.output", "logits", "layers.2.output", "layers.1.middle"):
            stop = session.run_to(place)
            assert isinstance(stop, Stopped)
            seen.append((stop, stop.value.numpy(), session.logits, stop.capture().norm))
        session.continue_()
        for stop, value, logits, norm in reversed(seen):
            again = session.go_to(stop.number)
            assert isinstance(again, Stopped)
            assert (again.forward, again.location) == (stop.forward, stop.location)
            assert different(again.value.numpy(), value) == 0
            assert np.array_equal(again.capture().norm, norm)
            assert (logits is None) == (session.logits is None)
            assert logits is None or different(session.logits, logits) == 0
        ends_as(session, prompt, reference)
        session.terminate()
    keep(local, kept_stops_per_session=256)


def the_past_can_be_changed_and_returned_to(local: Local) -> None:
    """An edit after step back goes its own way, the branch without it is still the reference."""
    prompt = prompt_of(local, 1.4, new_tokens=5)
    (reference,) = references_of(local, [prompt])
    session = prompt.launch(local)
    session.run_to("layers.1.output")
    session.run_to("layers.2.output")
    end = session.continue_()
    assert isinstance(end, Finished)
    plain = max(node.number for node in session.branches())
    stop = session.step_back()
    stop = session.step_back()
    assert isinstance(stop, Stopped) and stop.location == "layers.1.output"
    stop.edit(scale=-3.0)
    session.continue_()
    edited = session.tokens, session.logits
    changed = max(node.number for node in session.branches())
    assert different(edited[1], reference.last) > 0

    session.go_to(plain)
    assert tuple(session.tokens[len(prompt.ids) :]) == reference.tokens
    session.rewind(2, "layers.0.output")
    ends_as(session, prompt, reference)
    keep(local, kept_stops_per_session=0)
    session.go_to(changed)
    session.rewind(0, "layers.2.output")
    session.continue_()
    assert session.tokens == edited[0] and different(session.logits, edited[1]) == 0
    # and undone where it was made
    session.rewind(0, "layers.1.output")
    stop = session.stop
    assert stop is not None and len(session.edits) == 1
    stop.undo()
    ends_as(session, prompt, reference)
    keep(local, kept_stops_per_session=256)
    session.terminate()


def random_returns_end_alike(local: Local, seed: int, steps: int = 70) -> None:
    """Sessions stepped, forked, evicted, taken back and to other branches end as if left alone."""
    rng = random.Random(seed)
    keep(local, kept_stops_per_session=rng.choice([0, 2, 256]))
    prompts = [prompt_of(local, c, 5, seed + i) for i, c in enumerate((0.5, 1.4))]
    references = references_of(local, prompts)
    live: list[tuple[Session, int]] = [(p.launch(local), i) for i, p in enumerate(prompts)]
    returned = 0
    for _ in range(steps):
        session, which = rng.choice(live)
        status, choice = session.status, rng.randrange(12)
        if choice < 4 and status != "finished":
            rng.choice([session.next, session.step_out, session.step_in])()
        elif choice == 4 and status != "finished":
            session.run_to(rng.randrange(local.num_layers))
        elif choice == 5 and status != "finished" and rng.random() < 0.3:
            session.continue_()
        elif choice == 6 and status in ("stopped", "finished"):
            before = [n for n in session.branches() if n.status == "stopped"]
            if len(before) > 1 and session.newest.forward:
                forward = rng.randrange(session.newest.forward)
                session.rewind(forward, rng.randrange(local.num_layers))
                returned += 1
        elif choice in (7, 8):
            nodes = session.branches()
            session.go_to(rng.choice(nodes).number)
            returned += 1
        elif choice == 9 and len(live) < 6 and status != "finished":
            live.append((session.fork(), which))
        elif choice == 10 and status in ("stopped", "finished"):
            if local.kernel.state.residency.slots["host"].capacity:
                ask(session, m.Evict, to=rng.choice(["host", "disk"]))
        elif choice == 11:
            away = [n for n in session.branches() if n.branch]
            if len(away) > 8:
                session.prune(rng.choice(away).number)
            elif status == "stopped" and session.stop is not None:
                session.stop.edit(scale=0.5)
                session.stop.undo()
    assert returned > 3
    for session, which in live:
        for node in rng.sample(session.branches(), min(3, len(session.branches()))):
            session.go_to(node.number)
            ends_as(session, prompts[which], references[which])
        session.terminate()
    keep(local, kept_stops_per_session=256)
