"""What the gateway answers itself, without a model."""

from __future__ import annotations

import threading
from typing import Any

from kernel_server.event_log import EventLog
from kernel_server.gateway import MAX_HEADER_BYTES, Gateway
from kernel_server.protocol import codec
from kernel_server.protocol import messages as m


def _ask(gateway: Gateway, message: Any) -> Any:
    return codec.decode(gateway.handle("ann", "1", codec.encode(message)))


def _gateway() -> Gateway:
    return Gateway("abcd", "0.1.0", EventLog())


def test_another_build_is_refused_with_what_to_do() -> None:
    answer = _ask(_gateway(), m.Initialize(client="old", contract="000000000000"))

    assert answer.error.code == "NotSupported"
    assert "different builds" in answer.error.message


def test_while_loading_it_says_how_far_and_refuses_the_rest() -> None:
    gateway = _gateway()
    gateway.loading("reading weights", 0.25)
    hello = _ask(gateway, m.Initialize(client="new"))
    refused = _ask(gateway, m.ListSessions())

    assert (hello.phase, hello.progress, hello.fraction) == ("loading", "reading weights", 0.25)
    assert refused.error.code == "ModelLoading"
    assert "25%" in refused.error.message


def test_bytes_that_are_no_message_get_an_error_and_change_nothing() -> None:
    gateway = _gateway()
    answer = codec.decode(gateway.handle("ann", "1", b"\x00" * 40))

    assert answer.error.code == "BadMessage"
    assert _ask(gateway, m.Initialize(client="x")).phase == "loading"


def test_a_response_is_no_request() -> None:
    gateway = _gateway()
    answer = _ask(gateway, m.Texts(texts=("a",)))

    assert answer.error.code in ("BadMessage", "ModelLoading")


def test_a_request_of_too_much_text_is_refused_before_it_is_read() -> None:
    gateway = _gateway()
    answer = _ask(gateway, m.Tokenize(text="x" * MAX_HEADER_BYTES))
    after = _ask(gateway, m.Tokenize(text="x" * (MAX_HEADER_BYTES - 100)))

    assert answer.error.code == "BadMessage"
    assert f"at most {MAX_HEADER_BYTES} are read" in answer.error.message
    assert after.error.code == "ModelLoading"


def test_an_owner_with_too_many_jobs_is_refused_and_may_still_poll_and_pause() -> None:
    gateway = Gateway("abcd", "0.1.0", EventLog(), jobs=1)
    held, release = threading.Event(), threading.Event()

    def occupy() -> None:
        with gateway.jobs.one("ann"):
            held.set()
            release.wait(60)

    busy = threading.Thread(target=occupy)
    busy.start()
    assert held.wait(60)
    refused = _ask(gateway, m.ListSessions())
    polled = _ask(gateway, m.PollEvents(after=0, timeout_s=0))
    paused = _ask(gateway, m.Pause(session_id="s1"))
    other = codec.decode(gateway.handle("bob", "2", codec.encode(m.ListSessions())))
    release.set()
    busy.join(60)

    assert refused.error.code == "QuotaExceeded"
    assert polled == m.Events(events=(), last_seq=0)
    assert paused.error.code == other.error.code == "ModelLoading"
    assert _ask(gateway, m.ListSessions()).error.code == "ModelLoading"
