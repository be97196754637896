"""A real server with three tiers: pages leave and come back, across clients, budgets and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import djinn_nb as djinn
from djinn_nb import errors
from tests.djinn_nb.conftest import Process
from tests.system.conftest import FAULTS

#: 8 KiB a page of 16 tokens and 4 layers, two groups: a prompt of 64 tokens holds 8 pages
PAGE, PROMPT = 8192, list(range(64))
PAGES = 8

Start = Callable[..., djinn.Server]


@pytest.fixture
def start(model_folder: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a server with these flags; at the end its log must hold no fault."""
    processes: list[Process] = []

    def make(**flags: Any) -> djinn.Server:
        words = [w for k, v in flags.items() for w in (f"--{k.replace('_', '-')}", str(v))]
        process = Process(
            tmp_path / f"run{len(processes)}", "--model", str(model_folder),
            "--prefill-chunk", "16", "--check", "--disk-path", str(tmp_path), *words,
        )  # fmt: skip
        processes.append(process)
        return process.connect()

    yield make
    for number, process in enumerate(processes):
        process.end()
        log = (tmp_path / f"run{number}" / "log").read_text()
        assert not [word for word in FAULTS if word in log], log[-3000:]


def stopped(
    server: djinn.Server, seed: int = 0, *, pinned: bool = False, **wishes: Any
) -> djinn.Session:
    """A session of 8 pages that stands in the middle of its first decode."""
    prompt = [(token + seed) % 500 for token in PROMPT]
    session = server.launch(prompt, max_new_tokens=3, **wishes)
    if pinned:
        session.pin()
    session.run_to("logits")
    session.run_to("layers.2.output")
    return session


def finish(session: djinn.Session) -> tuple[list[int], np.ndarray[Any, Any]]:
    end = session.continue_()
    assert isinstance(end, djinn.Finished)
    logits = session.logits
    assert logits is not None
    return end.tokens, logits


def until(holds: Callable[[], bool], timeout_s: float = 200.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def row(server: djinn.Server, session: djinn.Session) -> Any:
    """The session as the table shows it, which is no asking for the session itself."""
    return server.sessions().loc[session.id]


@pytest.mark.parametrize("to", ["host", "disk"])
def test_an_evicted_session_outlives_its_client_and_is_continued_by_another(
    start: Start, to: str
) -> None:
    server = start(kv_memory="1MiB", host_memory="1MiB", disk_memory="1MiB")
    reference = stopped(server)
    tokens, logits = finish(reference)
    session = stopped(server, name="left behind")
    residency = session.evict(to=to)
    pages = residency.pages
    assert (residency.device, getattr(residency, to)) == (0, pages)
    assert not residency.is_resident
    address = server.address
    server.close()

    with djinn.connect(address) as other:
        found = other.attach("left behind")
        assert f"{to} {pages}" in repr(found)
        mine, values = finish(found)
        assert mine == tokens
        np.testing.assert_array_equal(values, logits)
        assert "needed" in " ".join(other.swaps().text)


def test_a_pinned_session_stays_and_a_restored_one_is_back(start: Start) -> None:
    server = start(kv_memory="1MiB", host_memory="1MiB")
    session = stopped(server)
    session.pin()
    with pytest.raises(errors.NotSupported, match="pinned"):
        session.evict()
    assert session.residency.pinned
    assert row(server, session).pinned
    session.pin(False)
    away = session.evict()
    assert row(server, session).device_MiB == 0
    back = session.restore()

    assert away.nbytes("host") == away.pages * PAGE
    assert back.is_resident
    assert "pinned" not in repr(session)


def test_tiers_that_are_full_are_errors_with_numbers_and_the_server_goes_on(start: Start) -> None:
    """20, 10 and 4 pages, and sessions of 9: at the latest the fourth finds no room."""
    server = start(kv_memory=20 * PAGE, host_memory=10 * PAGE, disk_memory=4 * PAGE)
    sessions, refused = [], None
    for number in range(8):
        try:
            sessions.append(stopped(server, seed=number))
        except errors.OutOfPages as error:
            refused = error
            break
    assert refused is not None, "everything fitted"
    assert "\n" not in str(refused)
    assert refused.details["needed"] > refused.details["free"]
    assert len(sessions) >= 2

    known = {session.id for session in sessions}
    (without_room,) = (found for found in server.sessions().index if found not in known)
    server.attach(without_room).terminate()
    # the newest first: those are on the device, and what they leave is room for the others
    for number, session in reversed(list(enumerate(sessions))):
        with djinn.connect(server.address) as alone:
            tokens, _ = finish(alone.attach(session.id))
        assert tokens[:64] == [(token + number) % 500 for token in PROMPT]
        session.terminate()
    assert isinstance(stopped(server, seed=99).continue_(), djinn.Finished)


def test_a_host_that_is_full_refuses_to_take_a_session_that_is_asked_to_go_there(
    start: Start,
) -> None:
    server = start(kv_memory=40 * PAGE, host_memory=12 * PAGE)
    first, second = stopped(server, 1), stopped(server, 2)
    first.evict()
    with pytest.raises(errors.OutOfPages, match=r"fit there.*--host-memory") as caught:
        second.evict()

    assert caught.value.details["needed"] > caught.value.details["free"]
    first.terminate()
    assert second.evict().device == 0
    with pytest.raises(errors.NotSupported, match="--disk-memory"):
        second.evict(to="disk")
    finish(second)


def test_idle_sessions_leave_and_hinted_ones_come_back(start: Start) -> None:
    server = start(kv_memory="1MiB", host_memory="1MiB", idle_after=1)
    # pinned until it is hinted: a client that is slow to do so has not left it alone
    session, other = stopped(server, 1), stopped(server, 2, pinned=True)
    other.hint(resume_in_s=3600)
    other.pin(False)
    until(lambda: row(server, session).device_MiB == 0)
    texts = server.swaps().set_index("session").text
    assert "left alone for" in texts[session.id]
    assert row(server, other).device_MiB > 0

    other.evict()
    assert row(server, other).device_MiB == 0
    other.hint(resume_in_s=3)
    until(lambda: row(server, other).device_MiB > 0)
    told = server.swaps()
    assert "its hint says that it goes on soon" in told[told.session == other.id].text.iloc[-1]
    assert told.bytes.sum() > 0
    finish(session)
    finish(other)


def test_without_the_idle_policy_sessions_stay(start: Start) -> None:
    server = start(kv_memory="1MiB", host_memory="1MiB", idle_after=0)
    session = stopped(server)
    time.sleep(3.0)

    assert row(server, session).device_MiB > 0
    assert server.swaps().empty


def test_budgets_are_changed_while_sessions_are_held(start: Start) -> None:
    server = start(kv_memory=40 * PAGE, host_memory=80 * PAGE)
    reference = finish(stopped(server, 0))
    sessions = [stopped(server, 0) for _ in range(3)]
    table = server.set_budget(device=14 * PAGE)
    assert table.loc["device", "budget_MiB"] == 14 * PAGE / 2**20
    held = "KV pages in use"
    until(lambda: server.memory().loc[held, "bytes"] <= 14 * PAGE)
    for session in sessions:
        tokens, logits = finish(session)
        assert tokens == reference[0]
        np.testing.assert_array_equal(logits, reference[1])
        assert server.memory().loc[held, "bytes"] <= 14 * PAGE
    assert "budget 14 pages" in server.memory().loc["KV pages free", "note"]
    with pytest.raises(errors.BadArgument, match="327,680"):
        server.set_budget(device="1MiB")


def test_budgets_of_which_one_is_refused_change_nothing(start: Start) -> None:
    server = start(kv_memory=40 * PAGE, host_memory=80 * PAGE)
    before = server.memory()
    assert "budget 40 pages" in before.loc["KV pages free", "note"]
    with pytest.raises(errors.BadArgument, match="for the host"):
        server.set_budget(device=20 * PAGE, host="9GiB")

    kinds = ["KV pages free", "KV pages free (host)"]
    assert server.memory().loc[kinds].equals(before.loc[kinds])
    table = server.set_budget(host=40 * PAGE, device=20 * PAGE)
    assert list(table.index) == ["device", "host"]
    notes = server.memory().loc[kinds, "note"]
    assert "budget 20 pages" in notes.iloc[0] and "budget 40 pages" in notes.iloc[1]


def test_every_byte_of_the_process_is_in_a_row(start: Start) -> None:
    """The rows add up to the resident set, and pages that are written take what their rows say."""
    server = start(kv_memory="24MiB", host_memory="24MiB", threads=1)
    prompt = [token % 500 for token in range(8000)]
    before = server.memory().bytes
    session = server.launch(prompt, max_new_tokens=3)
    session.run_to("logits")
    until(lambda: row(server, session).host_MiB > 0)
    after = server.memory().bytes

    for rows in (before, after):
        end = list(rows.index).index("host process")
        assert rows.iloc[:end].sum() == rows["host process"]
    pages = after["KV pages in use"]
    assert pages > 4 << 20
    never = before["never written"] - after["never written"]
    written = pages + after["KV pages in use (host)"]
    assert abs(-never - written) <= 0.1 * written + 64 * 1024
    grown = after["host process"] - before["host process"]
    assert grown >= 0.9 * written


def test_a_cap_that_leaves_too_little_for_the_pages_asked_for_is_refused(start: Start) -> None:
    with pytest.raises(errors.BadArgument, match=r"--device-memory of 67,108,864 leaves") as caught:
        start(kv_memory="64MiB", device_memory="64MiB")

    assert "--kv-memory of 67,108,864" in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"host_memory": "900TiB"}, "--host-memory and --disk-memory hold"),
        ({"host_memory": "1MiB", "disk_memory": "900TiB"}, "--disk-memory of 989,560,464,998,400"),
        (
            {"host_memory": "1MiB", "disk_memory": "1MiB", "disk_path": "/proc/foo"},
            "--disk-path /proc/foo takes no file for the 1,048,576 bytes",
        ),
    ],
)
def test_a_tier_that_cannot_be_is_refused_by_one_line(
    start: Start, tmp_path: Path, flags: dict[str, str], words: str
) -> None:
    with pytest.raises(errors.BadArgument, match=words):
        start(**flags)

    log = (tmp_path / "run0" / "log").read_text()
    assert "Traceback" not in log
    (line,) = [line for line in log.splitlines() if line.startswith("BadArgument: ")]
    assert words in line
