"""Whatever happens to a call, the transport stays usable and says what happened."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from djinn_nb.transport import Transport
from kernel_server.protocol.errors import (
    AccessDenied,
    BadArgument,
    ConnectionLost,
    NoServer,
    NotStopped,
    QuotaExceeded,
)
from kernel_server.service import Limits, Service
from kernel_server.wire import PAYLOAD_CAP

TOKEN = "a-token-for-tests-only"


class Server:
    """A service whose answers the tests steer, and what it has seen."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        #: what "hold" waits for, and how many were let go
        self.hold = threading.Event()
        self.released = 0
        self.events: list[bytes] = []
        self.changed = threading.Condition()
        self.service = self.start("127.0.0.1:0")

    def start(self, address: object, **limits: int) -> Service:
        self.service = Service(
            self.handle,
            {"me": TOKEN},
            address,  # type: ignore[arg-type]
            limits=Limits(**limits),  # type: ignore[arg-type]
        ).start()
        return self.service

    def handle(self, owner: str, connection_id: str, payload: bytes) -> bytes:
        self.seen.append(payload[:20])
        if payload.startswith(b"hold"):
            assert self.hold.wait(60)
            self.released += 1
        if payload == b"refuse":
            raise NotStopped("session 3 is running; pause() it first")
        if payload.startswith(b"sleep "):
            time.sleep(float(payload[6:]))
        if payload.startswith(b"events "):
            after = int(payload[7:])
            with self.changed:
                self.changed.wait_for(lambda: len(self.events) > after, timeout=1)
                return b"|".join(self.events[after:])
        return payload

    def publish(self, event: bytes) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def close(self) -> None:
        self.hold.set()
        self.service.close()


pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def transport(server: Server) -> Iterator[Transport]:
    transport = Transport(server.service.address, TOKEN)
    yield transport
    transport.close()


def test_answers_come_back_on_every_connection_and_are_counted(transport: Transport) -> None:
    large = os.urandom(2**20)

    assert transport.request(b"small") == b"small"
    assert transport.request(large, "bulk") == large
    traffic = transport.traffic
    assert (traffic["control"].bytes_sent, traffic["control"].bytes_received) == (5, 5)
    assert (traffic["bulk"].bytes_sent, traffic["bulk"].bytes_received) == (2**20, 2**20)
    assert traffic["events"].calls == 0


def test_a_servers_refusal_arrives_as_its_class(transport: Transport) -> None:
    with pytest.raises(NotStopped, match="pause"):
        transport.request(b"refuse")

    assert transport.request(b"next") == b"next"
    assert transport.traffic["control"].connects == 1


@pytest.mark.parametrize("payload", [bytearray(b"x"), "text", None, bytes(PAYLOAD_CAP + 1)])
def test_what_is_no_payload_is_refused_before_it_is_sent(
    payload: bytes, transport: Transport, server: Server
) -> None:
    with pytest.raises(BadArgument):
        transport.request(payload)

    assert server.seen == []


def test_the_largest_payload_passes_both_ways(transport: Transport) -> None:
    largest = bytes(PAYLOAD_CAP)

    assert transport.request(largest, "bulk") == largest


def test_threads_share_a_transport_and_get_their_own_answers(transport: Transport) -> None:
    wrong: list[bytes] = []

    def ask(name: int) -> None:
        for turn in range(50):
            mine = f"{name} {turn}".encode()
            if transport.request(mine, "control" if turn % 2 else "bulk") != mine:
                wrong.append(mine)

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


def test_bulk_and_events_do_not_hold_control(transport: Transport, server: Server) -> None:
    holding = threading.Thread(target=transport.request, args=(b"hold", "bulk"))
    holding.start()
    transport.listen(lambda after: b"hold", lambda answer: 0)
    assert _soon(lambda: server.seen.count(b"hold") == 2)

    assert transport.request(b"control") == b"control"
    assert server.released == 0  # both are still waiting
    server.hold.set()
    holding.join()


def test_a_call_not_answered_in_time_says_so_and_the_next_one_works(
    transport: Transport, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # however late the thread is that has to say so
    monkeypatch.setattr("djinn_nb.transport._GRACE_S", 60.0)
    held = []
    for timeout_s in (0.2, 2.0, 20.0):  # one that is over before the call went out shows nothing
        held.append(b"hold %d" % len(held))
        with pytest.raises(ConnectionLost, match="may have been carried out"):
            transport.request(held[-1], timeout=timeout_s)
        if _soon(lambda: held[-1] in server.seen, timeout_s):
            break

    assert transport.request(b"next", timeout=30) == b"next"
    assert transport.traffic["control"].connects == 1 + len(held)
    server.hold.set()
    seen = [payload for payload in server.seen if payload in held]
    assert _soon(lambda: server.released == len(seen))
    time.sleep(0.1)  # an answer that strayed would be there by now
    assert transport.request(b"and no stray answer") == b"and no stray answer"
    assert held[-1] in seen and len(seen) == len(set(seen))
    assert [payload for payload in server.seen if payload in held] == seen


def test_an_interrupt_ends_the_waiting_and_nothing_else(
    transport: Transport, server: Server
) -> None:
    main = threading.get_ident()

    def interrupt() -> None:
        # once the call is under way, however slow this machine is
        while b"hold" not in server.seen:
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    timer = threading.Thread(target=interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        transport.request(b"hold")

    assert server.released == 0  # it ended long before the call did
    server.hold.set()
    assert transport.request(b"next") == b"next"
    assert transport.traffic["control"].connects == 1
    timer.join()


def test_a_call_interrupted_before_it_was_sent_is_not_sent(
    transport: Transport, server: Server
) -> None:
    first = threading.Thread(target=transport.request, args=(b"hold",))
    first.start()
    assert _soon(lambda: b"hold" in server.seen)
    timer = threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        transport.request(b"never")
    server.hold.set()
    first.join()
    timer.join()

    assert transport.request(b"next") == b"next"
    assert b"never" not in server.seen


def test_interrupts_at_any_moment_never_mix_up_answers(transport: Transport) -> None:
    chance = random.Random(7)
    main, done = threading.get_ident(), threading.Event()
    calling = False

    def on_interrupt(*_: object) -> None:
        # Only a call may be interrupted, and once: anywhere else it would end this test run.
        nonlocal calling
        if calling:
            calling = False
            raise KeyboardInterrupt

    def bother() -> None:
        while not done.wait(chance.uniform(0.0002, 0.003)):
            # where a call takes longer than that, it has to be answered now and then all the same
            if interrupted <= 100 + 4 * answered:
                signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=bother)
    answered = interrupted = 0
    wrong: list[int] = []
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        thread.start()
        # both happen, however slow or fast this machine is
        while answered + interrupted < 1500 or min(answered, interrupted) <= 50:
            mine = bytes([chance.randrange(256)]) * chance.choice([1, 1000, 300_000])
            kind = chance.choice(["control", "bulk"])
            try:
                calling = True
                if transport.request(mine, kind) != mine:
                    wrong.append(answered)
                answered += 1
                calling = False
            except KeyboardInterrupt:
                interrupted += 1
    finally:
        done.set()
        thread.join()
        signal.signal(signal.SIGINT, before)

    assert wrong == []
    assert transport.request(b"calm") == b"calm"
    assert transport.traffic["control"].connects == transport.traffic["bulk"].connects == 1


def test_a_restarted_server_is_found_again_by_the_next_call(
    transport: Transport, server: Server
) -> None:
    transport.request(b"before")
    address = server.service.address
    server.service.close()
    server.start(address)

    assert transport.request(b"after") == b"after"
    assert server.seen == [b"before", b"after"]


def test_a_call_waits_a_moment_for_a_server_that_is_restarting(server: Server) -> None:
    address = server.service.address
    with Transport(address, TOKEN, patience_s=60.0) as transport:
        server.service.close()
        timer = threading.Timer(0.4, server.start, (address,))
        timer.start()

        assert transport.request(b"patient", timeout=60) == b"patient"
        timer.join()


def test_a_server_that_is_gone_is_named_with_what_to_do(
    transport: Transport, server: Server
) -> None:
    server.service.close()

    with pytest.raises(NoServer, match=r"127\.0\.0\.1:\d+ .*kernel_server serve") as caught:
        transport.request(b"x")
    assert "\n" not in str(caught.value)
    assert server.seen == []


def test_a_connection_lost_in_mid_call_is_not_repeated(
    transport: Transport, server: Server
) -> None:
    address = server.service.address

    is_lost = threading.Event()

    def restart() -> None:
        assert _soon(lambda: b"hold" in server.seen)
        closing = threading.Thread(target=server.service.close, kwargs={"timeout_s": 60})
        closing.start()
        assert is_lost.wait(30)  # the call is never answered
        server.hold.set()
        closing.join()
        server.start(address)

    restarting = threading.Thread(target=restart)
    restarting.start()
    with pytest.raises(ConnectionLost, match="broke during a call"):
        transport.request(b"hold")
    is_lost.set()
    restarting.join()

    assert transport.request(b"next") == b"next"
    assert server.seen.count(b"hold") == 1


def test_no_server_at_all_is_said_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(NoServer, match=r"127\.0\.0\.1:9 "):
        Transport("127.0.0.1:9", TOKEN)

    assert time.monotonic() - began < 15  # it waits for no answer: a call may take 30 s


def test_for_another_machine_the_error_tells_of_the_tunnel() -> None:
    with pytest.raises(NoServer, match=r"ssh -L 5556:localhost:5556 gpu-box\.invalid"):
        Transport("gpu-box.invalid:5556", TOKEN)


def test_a_wrong_token_and_a_full_server_raise_their_own_errors(server: Server) -> None:
    with pytest.raises(AccessDenied):
        Transport(server.service.address, "some-other-token")
    address = server.service.address
    server.service.close()
    server.start(address, connections_per_owner=1)

    with Transport(address, TOKEN) as transport:
        with pytest.raises(QuotaExceeded):
            Transport(address, TOKEN)
        assert transport.request(b"fine") == b"fine"


def _gather(transport: Transport, trouble: list[Exception | None]) -> list[bytes]:
    got: list[bytes] = []

    def take(answer: bytes) -> int:
        got.extend(answer.split(b"|") if answer else [])
        return len(got)

    transport.listen(lambda after: b"events %d" % after, take, on_trouble=trouble.append)
    return got


def _soon(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_events_arrive_once_each_in_order_across_a_restart(
    transport: Transport, server: Server
) -> None:
    trouble: list[Exception | None] = []
    got = _gather(transport, trouble)
    server.publish(b"0")
    assert _soon(lambda: got == [b"0"])
    address = server.service.address
    server.service.close()
    server.publish(b"1")
    server.publish(b"2")
    assert _soon(lambda: bool(trouble))
    server.start(address)
    server.publish(b"3")

    assert _soon(lambda: len(got) == 4)
    assert got == [b"0", b"1", b"2", b"3"]
    assert isinstance(trouble[0], ConnectionLost | NoServer) and trouble[-1] is None


def test_after_a_restart_the_listener_may_begin_again_before_anything_is_polled(
    transport: Transport, server: Server
) -> None:
    got: list[bytes] = []

    def begin_again(error: Exception | None) -> None:
        if error is None:
            transport.request(b"who is there")
            _listen_from(0)

    def _listen_from(after: int) -> None:
        transport.listen(
            lambda seen: b"events %d" % seen,
            lambda answer: (got.append(answer), 700)[1] if answer else 700,
            after=after,
            on_trouble=begin_again,
        )

    _listen_from(700)
    assert _soon(lambda: b"events 700" in server.seen)
    address = server.service.address
    server.service.close()
    server.publish(b"first of the new server")
    server.start(address)

    assert _soon(lambda: got == [b"first of the new server"])
    later = server.seen[server.seen.index(b"who is there") :]
    assert later[1] == b"events 0"


def test_a_failing_event_callback_is_told_and_tried_again(
    transport: Transport, server: Server
) -> None:
    trouble: list[Exception | None] = []
    seen: list[bytes] = []

    def take(answer: bytes) -> int:
        if answer and not seen:
            seen.append(b"failed")
            raise ZeroDivisionError("in a callback")
        seen.append(answer)
        return 1 if answer else 0

    transport.listen(lambda after: b"events %d" % after, take, on_trouble=trouble.append)
    server.publish(b"event")

    assert _soon(lambda: b"event" in seen)
    assert isinstance(trouble[0], ZeroDivisionError)
    assert transport.request(b"fine") == b"fine"


def test_closing_twice_in_mid_call_ends_the_call_and_the_threads(server: Server) -> None:
    transport = Transport(server.service.address, TOKEN)
    errors: list[Exception] = []

    def ask() -> None:
        try:
            transport.request(b"hold")
        except ConnectionLost as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    transport.close()
    transport.close()
    for thread in threads:
        thread.join(30)

    assert len(errors) == 3
    with pytest.raises(ConnectionLost, match="was closed"):
        transport.request(b"x")
