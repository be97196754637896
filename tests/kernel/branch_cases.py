"""What must hold when sessions go back, whatever the device."""

from __future__ import annotations

import dataclasses
import random

import numpy as np

from djinn_nb import Finished, Session, Stopped
from kernel_server.protocol import messages as m
from kernel_server.state import tensor_bytes
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


def keep(local: Local, **limits: int | None) -> None:
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


def what_is_kept_is_bounded(local: Local, steps: int = 50) -> None:
    """Two sessions with a hundred stops hold no more of those they left than a budget of three
    stops; going back to any of them, and comparing two, shows the same bits."""
    prompts = [prompt_of(local, 1.4, new_tokens=steps, seed=40 + i) for i in range(2)]
    references = references_of(local, prompts)
    state, engine = local.kernel.state, local.kernel.engine
    sessions = [prompt.launch(local) for prompt in prompts]
    seen: list[list[tuple[Stopped, np.ndarray]]] = [[] for _ in sessions]
    for session, stops in zip(sessions, seen, strict=True):
        stop = session.next()
        assert isinstance(stop, Stopped)
        stops.append((stop, stop.value.numpy()))
    inside = [state.sessions[session.id] for session in sessions]
    budget = 3 * tensor_bytes.stop_bytes(state.shape, inside[0])
    keep(local, kept_bytes=budget)
    for _ in range(steps - 1):
        for session, stops in zip(sessions, seen, strict=True):
            stop = session.next()
            assert isinstance(stop, Stopped)
            stops.append((stop, stop.value.numpy()))
            assert state.kept_bytes <= budget and engine.nbytes()[1] <= budget
    rows = {kind: (nbytes, note) for kind, nbytes, note in local.kernel.memory()}
    assert rows["kept stops"][0] <= budget and f"{budget:,}" in rows["kept stops"][1]
    assert sum(map(len, seen)) == 2 * steps > 4 * sum(len(one.tree.kept) for one in inside)
    for session, stops, prompt, reference in zip(sessions, seen, prompts, references, strict=True):
        first, last = stops[0][0].number, stops[-1][0].number
        compared = session.diff(first, last)
        assert compared.first_divergence is None, "of one way there is no other"
        for stop, value in (stops[0], stops[steps // 2], stops[-1], stops[3], stops[1]):
            again = session.go_to(stop.number)
            assert isinstance(again, Stopped) and different(again.value.numpy(), value) == 0
            assert engine.nbytes()[1] <= budget
        back = session.step_back()
        assert isinstance(back, Stopped) and different(back.value.numpy(), stops[0][1]) == 0
        session.rewind(0, "layers.0.output")
        ends_as(session, prompt, reference)
        session.terminate()
    keep(local, kept_bytes=1 << 30)


def edits_come_back(local: Local) -> None:
    """An edit that was left is there again, can be undone there, and differs as it did, though no
    tensor of a stop is kept."""
    prompt = prompt_of(local, 1.4, new_tokens=4)
    (reference,) = references_of(local, [prompt])
    found = []
    for budget in (1 << 30, 0):
        keep(local, kept_bytes=budget)
        session = prompt.launch(local)
        plain = session.run_to("layers.1.output")
        session.run_to("layers.3.output")
        plain_end = session.continue_()
        assert isinstance(plain, Stopped) and isinstance(plain_end, Finished)
        plain_last = max(node.number for node in session.branches())
        stop = session.go_to(plain.number)
        assert isinstance(stop, Stopped)
        stop.edit(scale=-3.0)
        value = stop.value.numpy()
        edited = stop.number
        session.continue_()
        tokens, last = session.tokens, session.logits
        edited_last = max(node.number for node in session.branches())
        compared = session.diff(plain_last, edited_last)
        assert state_kept(local) <= budget
        again = session.go_to(edited)
        assert isinstance(again, Stopped) and different(again.value.numpy(), value) == 0
        session.continue_()
        assert session.tokens == tokens and different(session.logits, last) == 0
        again = session.go_to(edited)
        assert isinstance(again, Stopped)
        again.undo()
        ends_as(session, prompt, reference)
        session.terminate()
        found.append((compared.first_divergence, value, tokens))
    assert found[0][0] == found[1][0] is not None
    assert different(found[0][1], found[1][1]) == 0 and found[0][2] == found[1][2]
    keep(local, kept_bytes=1 << 30)


def state_kept(local: Local) -> int:
    """Bytes that are kept of stops that were left."""
    return local.kernel.engine.nbytes()[1]


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
