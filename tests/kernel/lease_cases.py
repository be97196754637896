"""What must hold when sessions are put to rest and needed again, whatever the device."""

from __future__ import annotations

import resource
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest

from djinn_nb import Session, Stopped
from djinn_nb.logs import Logpoint
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import DjinnError
from kernel_server.state.events import Ticked
from notebooks.harness.exactness import different
from notebooks.harness.inprocess import Local
from tests.kernel.branch_cases import ends_as, references_of
from tests.kernel.cases import prompt_of
from tests.kernel.tier_cases import ask, settled, wait_until

#: Of the kernels here, which have a journal and pages in three tiers.
LEASE_S = 3600.0


def pass_time(local: Local, seconds: float) -> None:
    """Let the state's clock be so much later: as if nobody had been there."""
    local.kernel.loop.dispatch(Ticked(now=local.kernel.state.now + seconds))


def let_rest(local: Local, *sessions: Session) -> None:
    """Let a whole lease pass, and wait until these sessions are at rest, and no copy of a page that
    they gave back is under way."""
    pass_time(local, 0.95 * LEASE_S)
    pass_time(local, 0.2 * LEASE_S)
    wait_until(lambda: all(is_at_rest(local, session) for session in sessions))
    settled(local)


def is_at_rest(local: Local, session: Session) -> bool:
    """Asks the state, since any request would be a use of it."""
    return local.kernel.state.sessions[session.id].lease_ended


def rows(local: Local) -> dict[str, int]:
    return {kind: nbytes for kind, nbytes, _ in local.kernel.memory()}


def what_follows_a_rest_is_the_same(local: Local, to: str | None) -> None:
    """Stopped inside a layer, with edits on the way: 16 tokens and the logits, bit for bit."""
    prompt = prompt_of(local, 1.4, new_tokens=20)
    session = prompt.launch(local)
    hidden = local.kernel.info.hidden_size
    session.run_to("layers.1.output").edit(add=np.ones(hidden, np.float32), alpha=0.5)
    for _ in range(3):
        session.run_to("logits")
    session.stop.edit(scale=1.5)
    session.run_to("layers.2.middle").edit(scale=0.75, sticky=True)
    stop = session.run_to("layers.3.output")
    assert isinstance(stop, Stopped)
    stop.edit(zero=True, channels=[1, 3])
    value, capture = stop.value.numpy(), stop.capture().norm
    reference = session.fork()
    reference.continue_()
    expected, logits = reference.tokens, reference.logits
    assert len(expected) == len(prompt.ids) + 20 and session.forward == 3
    reference.terminate()
    if to is not None:
        ask(session, m.Evict, to=to)
    assert rows(local)["activations"] > 0
    before = session.refresh()

    let_rest(local, session)

    held = rows(local)
    for kind in ("KV pages in use", "KV pages in use (host)", "KV pages in use (disk)"):
        assert held[kind] == 0, kind
    wait_until(lambda: rows(local)["activations"] == 0)
    listed = local.server.sessions()
    assert "at rest on disk" in listed.loc[session.id, "note"]
    assert (listed.loc[session.id, "status"], listed.loc[session.id, "pages"]) == ("stopped", 0)
    after = session.refresh()
    assert after.dormant and after.lease_ended
    assert (after.stop, after.tokens, after.edits) == (before.stop, before.tokens, before.edits)

    assert different(stop.value.numpy(), value) == 0
    assert np.array_equal(stop.capture().norm, capture)
    assert not session.refresh().dormant
    session.continue_()
    assert session.tokens == expected
    assert different(session.logits, logits) == 0
    session.terminate()


def a_client_is_told(local: Local) -> None:
    """Once of each, by whatever it does next; not of a session that it goes on with."""
    session, other = (prompt_of(local, 1.4, seed=seed).launch(local) for seed in (1, 2))
    for one in (session, other):
        one.run_to("layers.2.output")
    told = local.server.client.leases
    pass_time(local, 0.95 * LEASE_S)
    wait_until(lambda: len(told.standing) == 2)
    with pytest.warns(UserWarning, match=f"session {other.id} .* in 6 min its lease, 60 min on"):
        session.refresh()
    assert [event.session_id for event in told.standing] == [other.id]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        local.server.sessions()
    pass_time(local, 0.2 * LEASE_S)
    wait_until(lambda: is_at_rest(local, other))
    wait_until(lambda: any(event.remaining_s == 0 for event in told.standing))
    assert not is_at_rest(local, session)
    with pytest.warns(UserWarning, match=f"session {other.id} is at rest on disk"):
        local.server.sessions()
    other.continue_()
    wait_until(lambda: not told.standing)
    for one in (session, other):
        one.terminate()


def restoring_computes_it_again(local: Local) -> None:
    session = prompt_of(local, 1.4).launch(local)
    session.run_to("layers.2.output")
    pages = session.residency.pages
    let_rest(local, session)

    assert session.restore().pages == pages
    assert session.residency.is_resident and not session.refresh().dormant
    session.terminate()


def records_of_logpoints_stay(local: Local) -> None:
    """What was noted is read while it rests and afterwards; what is noted later follows it."""
    prompt = prompt_of(local, 1.4, new_tokens=5)

    def logged() -> tuple[Session, list[Logpoint]]:
        session = prompt.launch(local)
        made = [
            session.log_at("every layer", tokens=-1),
            session.log_at([1, "layers.2.middle"], what="tensor"),
        ]
        for _ in range(2):
            session.run_to("logits")
        return session, made

    session, logs = logged()
    other, expected = logged()
    other.continue_()
    frames = [log.frame() for log in expected]
    tensors = expected[1].tensors()
    other.terminate()
    nbytes = rows(local)["logs"]
    assert nbytes > 0
    let_rest(local, session)

    assert rows(local)["logs"] == nbytes
    again = local.server.attach(session.id)
    for log, frame in zip(logs, frames, strict=True):
        fresh = next(point for point in again.breakpoints if point.id == log.id)
        pd.testing.assert_frame_equal(fresh.frame(), frame[: len(fresh.frame())])
        assert 0 < len(fresh.frame()) < len(frame)
    assert is_at_rest(local, session), "nothing had to be computed for that"
    session.continue_()
    for log, frame in zip(logs, frames, strict=True):
        pd.testing.assert_frame_equal(log.frame(), frame)
    found = logs[1].tensors()
    for name, wanted in tensors.items():
        assert different(found[name].values, wanted.values) == 0
    session.terminate()
    assert rows(local)["logs"] == 0


def branches_and_forks(local: Local) -> None:
    """A fork that is used keeps the pages it shares; each node can be returned to after a rest."""
    prompt = prompt_of(local, 1.4, new_tokens=5)
    (reference,) = references_of(local, [prompt])
    session = prompt.launch(local)
    seen = []
    for place in ("layers.1.output", "logits", "layers.2.output"):
        stop = session.run_to(place)
        seen.append((stop, stop.value.numpy()))
    child = session.fork()
    child.pin()
    session.step_back()
    session.stop.edit(scale=2.0)
    session.continue_()
    let_rest(local, session)

    assert not child.refresh().dormant
    used = rows(local)["KV pages in use"]
    assert used == child.refresh().kv_bytes
    ends_as(child, prompt, reference)
    for stop, value in reversed(seen):
        again = session.go_to(stop.number)
        assert isinstance(again, Stopped)
        assert (again.forward, again.location) == (stop.forward, stop.location)
        assert different(again.value.numpy(), value) == 0
    ends_as(session, prompt, reference)
    child.terminate()
    session.terminate()


def two_clients_and_the_end_of_a_lease(local: Local) -> None:
    """Leases end while two clients step the session, or have just ended: one winner each time.

    In every second round the lease has ended for certain, in the others it may come at any moment.
    """
    prompt = prompt_of(local, 1.4, new_tokens=5)
    (reference,) = references_of(local, [prompt])
    session = prompt.launch(local)
    session.run_to("embedding")
    refused: list[DjinnError] = []

    def step() -> None:
        try:
            local.server.attach(session.id).next()
        except DjinnError as error:
            refused.append(error)

    for round_ in range(12):
        if round_ % 2:
            pass_time(local, 0.95 * LEASE_S)
        else:
            let_rest(local, session)
        ending = threading.Thread(target=pass_time, args=(local, 0.2 * LEASE_S))
        threads = [ending, *(threading.Thread(target=step) for _ in range(2))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), f"round {round_} does not end"
    assert {error.code for error in refused} <= {"StaleStop", "NotStopped"}, refused
    rests = sum("put to rest" in line for line in session.story())
    assert rests >= 6, session.story()
    ends_as(local.server.attach(session.id), prompt, reference)
    session.terminate()


def what_cannot_be_written_stays(local: Local) -> None:
    """With no room in the journal it is warned of once more, and rests when there is room."""
    client = local.server.client
    prompt = prompt_of(local, 1.4, new_tokens=4)
    (reference,) = references_of(local, [prompt])
    session = prompt.launch(local)
    session.run_to("layers.2.output")
    pages = session.residency.pages
    with a_full_disk():
        pass_time(local, 0.95 * LEASE_S)
        pass_time(local, 0.2 * LEASE_S)
        leases = local.kernel.state.leases
        wait_until(lambda: bool(leases[session.id].lacks))
        assert "File too large" in leases[session.id].lacks
        assert sum(map(len, local.kernel.state.sessions[session.id].tables)) == pages
        wait_until(lambda: any("cannot be" in one.text for one in client.leases.standing))
        with pytest.warns(UserWarning) as told:
            local.server.sessions()
        texts = [str(one.message) for one in told]
        assert len(texts) == 2 and all("File too large" in text for text in texts)
        assert f"the lease of session {session.id} has ended, but it cannot" in texts[1]
    wait_until(lambda: not client.durability._text)
    with pytest.warns(UserWarning, match="sessions are durable again"):
        local.server.sessions()
    pass_time(local, 0.2 * LEASE_S)
    wait_until(lambda: is_at_rest(local, session))
    ends_as(session, prompt, reference)
    session.terminate()


@contextmanager
def a_full_disk() -> Iterator[None]:
    """No file of this process may grow; the limit is the system's own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
