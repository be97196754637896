"""Several clients of one server: one of two steps wins, nobody is shut out, floods hit a limit."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

import djinn_nb as djinn
from djinn_nb import errors
from tests.djinn_nb.conftest import NUM_LAYERS
from tests.system.conftest import PROMPT

RACES = 60


@pytest.fixture
def other(world):
    with world.connect() as server:
        yield server


def at_once(*calls):
    """Start all calls together; returns what each answered or raised."""
    barrier = threading.Barrier(len(calls))
    results: list[object] = [None] * len(calls)

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_exactly_one_of_two_simultaneous_steps_wins_every_race(world, canary, other):
    mine = world.launch(max_new_tokens=40)
    theirs = other.attach(mine.id)
    reference = mine.fork()
    outcomes: Counter[str] = Counter()
    for race in range(RACES):
        assert mine.status == theirs.status == ("waiting" if race == 0 else "stopped")
        results = at_once(mine.next, theirs.next)
        won = [r for r in results if isinstance(r, djinn.Stopped)]
        lost = [r for r in results if isinstance(r, (errors.StaleStop, errors.NotStopped))]
        assert (len(won), len(lost)) == (1, 1), results
        outcomes["mine" if isinstance(results[0], djinn.Stopped) else "theirs"] += 1
        expected = reference.next()
        # the slower sees the newer stop, with the same values
        for seen in (mine.stop, theirs.stop):
            assert (seen.number, seen.location) == (expected.number, expected.location)
    np.testing.assert_array_equal(mine.stop.value.numpy(), reference.stop.value.numpy())

    assert outcomes.total() == RACES
    assert RACES > 3 * (NUM_LAYERS + 2)
    assert mine.continue_().tokens == reference.continue_().tokens


def test_clients_see_the_same_sessions_breakpoints_and_edits(world, canary, other):
    mine = world.launch(max_new_tokens=6, name="shared")
    theirs = other.attach("shared")
    mine.break_at(3)
    theirs.break_at(1, when="decode")
    mine.continue_()
    mine_edit = mine.stop.edit(scale=0.5, tokens=-1)
    theirs_edit = theirs.stop.edit(add=1.0, tokens=0)

    assert set(world.server.sessions().index) == set(other.sessions().index)
    for session in (mine, theirs):
        assert [edit.id for edit in session.edits] == [mine_edit.id, theirs_edit.id]
        assert [point.location for point in session.breakpoints] == [
            "layers.3.output", "layers.1.output",
        ]  # fmt: skip
    np.testing.assert_array_equal(
        mine.stop.hidden_states.numpy(), theirs.stop.hidden_states.numpy()
    )
    theirs_edit.undo()
    assert [edit.id for edit in mine.edits] == [mine_edit.id]


def test_edits_made_at_once_all_count_in_one_order_for_all(world, canary, other):
    mine = world.launch(max_new_tokens=6)
    mine.run_to(2)
    theirs = other.attach(mine.id)
    stops = [mine.stop, theirs.stop]
    before = stops[0].hidden_states.numpy()
    results = at_once(*[lambda s=s: s.edit(add=1.0, tokens=0) for s in stops * 8])

    assert all(isinstance(r, djinn.Edit) for r in results), results
    assert sorted(r.id for r in results) == list(range(1, 17))
    expected = before[0]
    for _ in results:
        expected = expected + np.float32(1)
    for session in (mine, theirs):
        np.testing.assert_array_equal(session.stop.hidden_states.numpy()[0], expected)


def test_a_download_holds_the_values_from_before_or_after_an_edit(
    world, canary, other, monkeypatch
):
    from djinn_nb import client as client_module

    monkeypatch.setattr(client_module, "CHUNK_BYTES", 4096)
    session = world.launch([1, 2, 3] * 300, max_new_tokens=2)
    stop = session.run_to(3)
    theirs = other.attach(session.id).stop
    for _ in range(10):
        before = theirs.hidden_states.numpy()
        session.client.mirror.values_changed(session.id)
        got, edit = at_once(stop.hidden_states.numpy, lambda: theirs.edit(scale=2.0))
        after = theirs.hidden_states.numpy()
        assert np.array_equal(got, before) or np.array_equal(got, after)
        edit.undo()


def test_continue_and_terminate_at_once_leave_nothing(world, canary, other):
    for _ in range(12):
        mine = world.launch(max_new_tokens=30)
        theirs = other.attach(mine.id)
        ran, ended = at_once(mine.continue_, theirs.terminate)

        assert ended is None
        assert isinstance(ran, (errors.UnknownSession, djinn.Finished)), ran
        assert mine.id not in world.server.sessions().index


def test_pauses_and_steps_at_once_leave_a_session_that_goes_on_exactly(world, canary, other):
    mine = world.launch(max_new_tokens=40)
    expected = mine.fork().continue_().tokens
    theirs = other.attach(mine.id)
    while mine.status != "finished":
        results = at_once(mine.continue_, theirs.pause, theirs.pause)
        for result in results:
            if isinstance(result, Exception):
                assert isinstance(result, (errors.StaleStop, errors.NotStopped)), result
        mine.stop, theirs.stop  # noqa: B018 - both look where it stands
    assert mine.tokens == expected


def test_a_flood_of_launches_hits_the_quota_and_costs_the_others_nothing(world, canary, other):
    made, refused = [], []

    def flood(server) -> None:
        for _ in range(40):
            try:
                made.append(server.launch(PROMPT, max_new_tokens=4))
            except errors.QuotaExceeded as error:
                refused.append(error)

    at_once(lambda: flood(world.server), lambda: flood(other))
    canary.step()

    assert refused
    assert len(world.server.sessions()) == len(made) + 2
    assert "\n" not in str(refused[0])
    assert str(len(made) + 2) in str(refused[0])
    made[0].terminate()
    assert isinstance(other.launch(PROMPT, max_new_tokens=2).continue_(), djinn.Finished)


def patiently(connect: Callable[[], djinn.Server]) -> djinn.Server:
    """The server learns bit by bit that others have gone."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return connect()
        except errors.QuotaExceeded:
            assert time.monotonic() < deadline, "there is never room again"
            time.sleep(0.05)


def test_too_many_connections_are_refused_by_name_and_the_old_ones_work(world, canary):
    servers: list[djinn.Server] = []
    try:
        with pytest.raises(errors.QuotaExceeded) as refused:
            for _ in range(60):
                servers.append(world.connect())
        canary.step()

        assert "\n" not in str(refused.value)
        assert len(servers) > 20
    finally:
        for server in servers:
            server.close()
    with patiently(world.connect) as again:
        assert not again.sessions().empty
