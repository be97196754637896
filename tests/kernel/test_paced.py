"""Whose time it is: what a kernel tells its pacer of runs, copies, looks and records."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from kernel_server.engine.tiers import CopyDone
from kernel_server.protocol import codec
from kernel_server.protocol import messages as m
from notebooks.harness.company import start
from notebooks.harness.faults import instead
from notebooks.harness.inprocess import OWNER, Local, local_kernel
from tests.djinn_nb.conftest import LONG, make_model
from tests.kernel.tier_cases import settled, wait_until

BOB = "bob"


class Told(NamedTuple):
    """One thing the pacer was told of, on which thread."""

    what: str
    owner: str | None
    thread: str


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    folder = tmp_path_factory.mktemp("kernel")
    with local_kernel(
        model=make_model(folder / "tiny", tokenizer=False), dtype="float32", device="cpu",
        prefill_chunk=16, kv_memory_bytes=32 << 20, host_memory_bytes=8 << 20,
        state_dir=folder / "journal",
    ) as made:  # fmt: skip
        yield made


@contextlib.contextmanager
def telling(local: Local) -> Iterator[list[Told]]:
    """What the pacer is told, besides by the threads of calls."""
    pacer, found = local.kernel.gateway.pacer, list[Told]()

    def noting(name: str) -> contextlib.AbstractContextManager[None]:
        tell = getattr(pacer, name)

        def note(owner: str | None, *seconds: float) -> None:
            assert all(each >= 0 for each in seconds)
            found.append(Told(name, owner, threading.current_thread().name))
            tell(owner, *seconds)

        return instead(pacer, name, note)

    with noting("runs"), noting("spend"), noting("take"):
        yield found


@contextlib.contextmanager
def running(local: Local) -> Iterator[None]:
    """A session of the first owner's runs all the time."""
    session = local.server.launch(list(range(5, 25)), max_new_tokens=LONG)
    start(session)
    yield
    assert session.refresh().status == "running"
    session.terminate()


def ask(local: Local, message: Any) -> Any:
    """What bob is answered."""
    answer = codec.decode(local.kernel.gateway.handle(BOB, "here", codec.encode(message)))
    assert not isinstance(answer, m.ErrorReply), answer
    return answer


@contextlib.contextmanager
def stopped(local: Local) -> Iterator[m.SessionInfo]:
    """A session of bob's that stands inside its prefill."""
    launched = ask(local, m.Launch(token_ids=tuple(range(5, 69)), max_new_tokens=2))
    session_id = launched.session.id
    seen = launched.session.stop_number
    ask(local, m.RunTo(session_id=session_id, seen=seen, location="layers.2.output"))

    def info() -> m.SessionInfo:
        return ask(local, m.Describe(session_id=session_id)).session

    wait_until(lambda: info().status == "stopped")
    yield info()
    ask(local, m.Terminate(session_id=session_id))


def test_the_pacer_is_told_whose_session_runs(local: Local) -> None:
    with telling(local) as found:
        with running(local):
            assert local.kernel.gateway.pacer._runner == OWNER
        wait_until(lambda: found[-1].what == "runs" and found[-1].owner is None)

    owners = [told.owner for told in found if told.what == "runs"]
    assert set(owners) == {OWNER, None}
    assert all(a != b for a, b in itertools.pairwise(owners))  # changes, not each token


def test_while_two_run_it_is_told_of_each_turn(local: Local) -> None:
    with telling(local) as found, running(local), stopped(local):
        pass

    assert {told.owner for told in found if told.what == "runs"} >= {OWNER, BOB}


def test_copies_count_for_who_wants_them(local: Local) -> None:
    with running(local), stopped(local) as session:
        settled(local)
        with telling(local) as found:
            ask(local, m.Evict(session_id=session.id, to="host"))
            ask(local, m.Restore(session_id=session.id))
            # on the one thread they are begun, on the other told of
            threads = ("engine", "copies host-device")
            wanted = {Told(what, BOB, each) for what in ("spend", "take") for each in threads}
            wait_until(lambda: wanted <= set(found))


def test_what_the_host_takes_to_begin_a_copy_counts_too(local: Local) -> None:
    copier, found = local.kernel.engine._copier, list[tuple[str, float]]()
    assert copier is not None
    tell, take = copier._told, local.kernel.gateway.pacer.take

    def took(done: CopyDone) -> None:
        tell(dataclasses.replace(done, host_s=5.0))  # as on a GPU, and longer

    def note(owner: str, used_s: float) -> None:
        found.append((owner, used_s))
        take(owner, used_s)

    with running(local), stopped(local) as session:
        settled(local)
        with instead(copier, "_told", took), instead(local.kernel.gateway.pacer, "take", note):
            ask(local, m.Evict(session_id=session.id, to="host"))
            ask(local, m.Restore(session_id=session.id))
            wait_until(lambda: (BOB, 5.0) in found)


def test_copies_made_beforehand_are_nobodys(local: Local) -> None:
    with telling(local) as found, running(local), stopped(local) as session:
        state = local.kernel.state
        pages = {page for table in state.sessions[session.id].tables for page in table}
        wait_until(lambda: not pages & state.residency.dirty)
        settled(local)
        made = [told for told in found if told.thread.startswith("copies")]

    assert pages and not made


def test_a_look_counts_for_who_looks_and_so_does_what_is_recorded(local: Local) -> None:
    with telling(local) as found, running(local), stopped(local) as session:
        # when it stopped, at the latest
        wait_until(lambda: Told("take", BOB, "journal") in found)
        before = found.count(Told("take", BOB, "engine"))
        assert not [told for told in found if told.what == "spend"]
        ask(local, m.ReadValue(session_id=session.id, seen=session.stop_number, what="tensor"))
        wait_until(lambda: found.count(Told("take", BOB, "engine")) > before)

    here = threading.current_thread().name
    assert found.count(Told("spend", BOB, here)) == 1  # the whole request, for those who ask
