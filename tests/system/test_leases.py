"""A server with a lease, as a process on the real clock: what rests survives its `kill -9` too."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import djinn_nb as djinn
from kernel_server.cli import main
from kernel_server.protocol import messages as m
from tests.system.conftest import PROMPT
from tests.system.test_restarts import NEXT, Restarts, finished, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # what is said of sessions that a busy machine let rest on the way
    pytest.mark.filterwarnings("ignore:session s"),
]


@pytest.fixture
def leased(model_folder: Path, tmp_path: Path) -> Iterator[Restarts]:
    made = Restarts(
        tmp_path / "run", "--model", str(model_folder), "--prefill-chunk", "8", "--check",
        "--lease", "3s",
    )  # fmt: skip
    yield made
    made.close()
    made.require_sound()


def at_rest(server: djinn.Server, *ids: str) -> bool:
    """Listing is no use of a session."""
    notes = server.sessions()["note"]
    return all("at rest on disk" in notes[session_id] for session_id in ids)


def told_of_lease(server: djinn.Server, session_id: str, since: int) -> list[str]:
    """What the server has told its clients since then of the lease of a session."""
    polled = server.client.call(m.PollEvents(after=since, timeout_s=0), m.Events)
    return [e.text for e in polled.events if (e.kind, e.session_id) == ("lease", session_id)]


def test_it_rests_and_goes_on_and_so_it_does_after_a_kill(leased, tmp_path, capsys):
    server = leased.server
    reference = server.launch(PROMPT, max_new_tokens=NEXT, temperature=0.8, seed=4)
    reference.run_to("layers.2.middle").edit(scale=1.25)
    expected, logits = finished(reference), reference.logits
    reference.terminate()
    session = server.launch(PROMPT, max_new_tokens=NEXT, temperature=0.8, seed=4)
    session.run_to("layers.2.middle").edit(scale=1.25)
    log = session.log_at(3, tokens=-1)
    session.run_to("logits")
    other = server.launch(PROMPT, max_new_tokens=NEXT)
    other.run_to(2)
    other.pin()
    since = server.client.initialize().event_seq
    stop = session.run_to("layers.4.output")
    noted, stood = log.frame(), session.newest.stop
    # whichever of the two this client hears first: there are 0.3 s between them
    with pytest.warns(UserWarning, match=f"session {session.id} .* its lease(, 3 s on| has ended)"):
        until(lambda: at_rest(server, session.id))
        until(lambda: server.client.leases.standing)
        server.session_names()
    *_, warned, ended = told_of_lease(server, session.id, since)
    assert f"session {session.id} has not been used for" in warned and ", 3 s on" in warned
    assert f"session {session.id} is at rest on disk" in ended
    used = server.memory()["bytes"]
    assert used["KV pages in use"] == other.refresh().kv_bytes
    assert used["logs"] > 0
    capsys.readouterr()
    assert main(["status", "--socket", leased.process.address.removeprefix("unix:")]) == 0
    assert "1 at rest on disk since their lease ended" in capsys.readouterr().out

    assert log.frame().equals(noted)
    assert at_rest(server, session.id)
    value = stop.hidden_states.numpy()  # computed again
    until(lambda: at_rest(server, session.id))

    leased.restart(signal.SIGKILL)

    info = session.refresh()
    assert (info.dormant, info.lease_ended) == (True, False)
    assert (info.status, info.stop) == ("stopped", stood)
    np.testing.assert_array_equal(stop.hidden_states.numpy(), value)
    assert finished(session) == expected
    np.testing.assert_array_equal(session.logits, logits)
    assert other.residency.pinned and not session.residency.pinned
    assert isinstance(other.continue_(), djinn.Finished)
