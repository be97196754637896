"""A server with a lease, as a process on the real clock: what rests survives its `kill -9` too."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import djinn_nb as djinn
from kernel_server.cli import main
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
    stop = session.run_to("layers.4.output")
    noted, stood = log.frame(), session.newest.stop
    with pytest.warns(
        UserWarning, match=f"session {session.id} has not been used for .* its lease, 3 s on"
    ):
        until(lambda: server.client.leases.standing or at_rest(server, session.id))
        server.session_names()
    until(lambda: at_rest(server, session.id))
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
    assert isinstance(other.continue_(), djinn.Finished)
