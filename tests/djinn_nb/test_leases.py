"""What a connection keeps of leases, and what the views show of it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

from djinn_nb import briefs, leases
from djinn_nb.leases import Leases
from kernel_server.protocol import messages as m
from kernel_server.protocol.snapshot import Notice

TEXT = "session {} has not been used for 54 min: in 6 min its lease ends; to keep it, use it"


def lease(session_id: str, remaining_s: float = 360.0, text: str = TEXT) -> m.Event:
    return m.Event(
        seq=1,
        kind="lease",
        session_id=session_id,
        remaining_s=remaining_s,
        text=text.format(session_id),
    )


def test_each_is_said_once():
    found = Leases()
    found.take(lease("s1"))
    found.take(lease("s2"))
    with pytest.warns(UserWarning) as said:
        found.warn()
    assert [str(one.message)[:10] for one in said] == ["session s1", "session s2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.warn()
    assert [event.session_id for event in found.standing] == ["s1", "s2"]


@pytest.mark.parametrize("kind", ["changed", "continued", "progress", "stopped", "terminated"])
def test_it_is_over_when_the_session_is_used_by_anyone(kind):
    found = Leases()
    found.take(lease("s1"))
    found.take(m.Event(seq=2, kind="swapped", session_id="s1"))
    assert found.standing
    found.take(m.Event(seq=3, kind=kind, session_id="s1"))
    assert not found.standing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.warn()


def test_a_call_of_ours_ends_the_warning_and_not_what_has_ended():
    found = Leases()
    found.take(lease("s1"))
    found.take(lease("s2", remaining_s=0.0))
    found.asked(m.ListBranches(session_id="s1"))
    found.asked(m.ListSessions())
    assert len(found.standing) == 2
    for session_id in ("s1", "s2"):
        found.asked(m.Describe(session_id=session_id))
    assert [event.session_id for event in found.standing] == ["s2"]


def test_a_warning_that_nothing_followed_is_over(monkeypatch):
    monkeypatch.setattr(leases, "GRACE_S", -1.0)
    found = Leases()
    found.take(lease("s1", remaining_s=0.5))
    assert not found.standing


def test_a_notice_says_what_to_do():
    assert briefs.leases(()) is None
    notice = briefs.leases((lease("s1"), lease("s2")))
    assert notice is not None
    assert (notice.level, notice.code) == ("warning", "Lease")
    assert notice.text.startswith("session s2 has not been used for 54 min")
    assert "1 more" in notice.text and notice.advice == "To keep it, use it."


def test_the_views_show_it_behind_what_an_action_has_to_say(bench, session, eventually):
    told = session.client.leases
    # of a session that no other event is about
    dormant = replace(session.newest, id="s999", dormant=True)
    told.take(replace(lease("s999", remaining_s=0.0), session=dormant))
    bench.changed()
    eventually(lambda: getattr(bench.snapshot().notice, "code", "") == "Lease")
    assert bench.snapshot().notice.level == "info"

    bench.notify(Notice(level="error", code="StaleStop", text="it has moved on"))
    eventually(lambda: bench.snapshot().notice.code == "StaleStop")
    bench.notify(None)
    eventually(lambda: getattr(bench.snapshot().notice, "code", "") == "Lease")
    told.forget()
    bench.changed()
    eventually(lambda: bench.snapshot().notice is None)
