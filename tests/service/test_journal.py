"""The journal on disk: what was given to it is there, what is not whole is not loaded."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kernel_server.journal import FILE, Journal
from kernel_server.journal_frames import HEAD_BYTES, good_frames, read
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import BrokenJournal, JournalInUse
from kernel_server.state.instructions import WriteJournal
from tests.state.world import World

VALUE = Array.from_numpy(np.arange(2000, dtype=np.float32))


def instructions(count: int = 3) -> list[WriteJournal]:
    """States of a few sessions, as a server gives them to its journal."""
    world = World(journal=True)
    found: list[WriteJournal] = []
    world._record = found.append  # type: ignore[method-assign]
    for _ in range(count):
        world.launch(max_new_tokens=4)
    return found


def written(folder: Path, given: list[WriteJournal]) -> Journal:
    journal = Journal(folder)
    journal.start(lambda text: None)
    for instruction in given:
        journal.write(instruction)
        settled(journal)
    return journal


def settled(journal: Journal) -> None:
    done = threading.Event()
    journal.after(done.set)
    assert done.wait(60)


def test_what_was_written_is_there_for_the_next(tmp_path):
    given = instructions()
    first = written(tmp_path / "j", given)
    identity = first.identity
    first.close()
    second = Journal(tmp_path / "j")

    assert second.identity == identity
    assert set(second.contents.sessions) == {"s1", "s2", "s3"}
    assert second.contents.sessions["s2"][0] == given[1].record
    assert second.contents.number == 3
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o700
    assert second.path.stat().st_mode & 0o777 == 0o600
    second.close()


def test_a_record_that_has_no_bytes_leaves_the_others_and_is_told(tmp_path):
    one, two, _ = instructions()
    told: list[str] = []
    journal = Journal(tmp_path / "j")
    journal.start(told.append)
    journal.write(replace(one, record=replace(one.record, seed=1 << 70)))
    journal.write(two)
    settled(journal)
    assert len(told) == 1 and "s1 cannot be recorded" in told[0] and "\n" not in told[0]
    journal.write(one)
    settled(journal)
    assert told[1:] == [""]
    journal.close()
    again = Journal(tmp_path / "j")
    assert set(again.contents.sessions) == {"s1", "s2"}
    again.close()


def test_an_array_is_written_once_and_goes_with_its_last_session(tmp_path):
    one, two, _ = instructions()
    given = [
        WriteJournal(session_id=i.session_id, number=2, record=i.record, arrays=(*i.arrays, VALUE))
        for i in (one, two, one, two)
    ]
    journal = written(tmp_path / "j", given)
    assert journal.path.read_bytes().count(bytes(VALUE.data)) == 1
    for session_id in ("s1", "s2"):
        journal.write(WriteJournal(session_id=session_id, number=2, record=None))
    settled(journal)
    journal.close()
    Journal(tmp_path / "j").close()
    assert bytes(VALUE.data) not in journal.path.read_bytes()


def test_a_torn_end_is_cut_wherever_it_is_torn(tmp_path):
    given = instructions()
    journal = written(tmp_path / "j", given)
    journal.close()
    data = journal.path.read_bytes()
    ends = [end for _, end, _, _ in good_frames(data)]
    rng = random.Random(0)
    for cut in [*ends, *(rng.randrange(ends[0], len(data)) for _ in range(60))]:
        found = read(data[:cut], "it")
        whole = sum(end <= cut for end in ends)
        assert found.count == whole and found.torn_bytes == cut - ends[whole - 1]
        assert not found.damage and not found.doubtful
    journal.path.write_bytes(data[: ends[-1] - 5])
    again = Journal(tmp_path / "j")
    assert set(again.contents.sessions) == {"s1", "s2"}
    again.close()


@pytest.mark.parametrize("how", ["a bit", "a frame", "zeros", "swapped"])
def test_damage_in_the_middle_is_found_and_what_may_be_old_is_named(tmp_path, how):
    given = [*instructions(), instructions()[0]]
    journal = written(tmp_path / "j", given)
    journal.close()
    data = bytearray(journal.path.read_bytes())
    frames = [(a, b) for a, b, _, _ in good_frames(bytes(data))]
    # head, then for each an array (the prompt, once) and a record
    sessions = [f for f, (_, _, _, p) in zip(frames, good_frames(bytes(data)), strict=True)
                if b"JournalSession" in bytes(p)[:60]]  # fmt: skip
    begin, end = sessions[1]
    if how == "a bit":
        data[(begin + end) // 2] ^= 1
    elif how == "a frame":
        del data[begin:end]
    elif how == "zeros":
        data[begin:end] = bytes(end - begin)
    else:
        third = data[sessions[2][0] : sessions[2][1]]
        data[begin : sessions[2][1]] = third + data[begin:end]
    journal.path.write_bytes(data)
    again = Journal(tmp_path / "j")

    assert len(again.contents.damage) >= 1
    assert "s2" not in again.contents.sessions
    assert "s1" not in again.contents.doubtful  # its newest state lies behind the damage
    assert list((tmp_path / "j").glob(f"{FILE}.damaged-*"))
    again.close()


def test_every_bit_of_a_frame_counts(tmp_path):
    journal = written(tmp_path / "j", instructions(1))
    journal.close()
    data = journal.path.read_bytes()
    whole = len(list(good_frames(data)))
    rng = random.Random(1)
    for _ in range(200):
        hurt = bytearray(data)
        hurt[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        assert len(list(good_frames(bytes(hurt)))) < whole


def test_two_never_share_one_and_a_dead_one_holds_none(tmp_path):
    journal = Journal(tmp_path / "j")
    with pytest.raises(JournalInUse, match="another server"):
        Journal(tmp_path / "j", wait_s=0.1)
    journal.start(lambda text: None)
    journal.close()
    code = (
        "import sys, pathlib, os; from kernel_server.journal import Journal\n"
        "Journal(pathlib.Path(sys.argv[1])); print('holds', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "j")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with holder:
        assert holder.stdout is not None and holder.stdout.readline()
        with pytest.raises(JournalInUse):
            Journal(tmp_path / "j", wait_s=0.1)
        holder.kill()
        holder.wait()
        Journal(tmp_path / "j", wait_s=2.0).close()


@pytest.mark.parametrize("content", [b"hello", bytes(HEAD_BYTES * 2), b"DJJ1" * 40])
def test_what_is_no_journal_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "j").mkdir(mode=0o700)
    (tmp_path / "j" / FILE).write_bytes(content)
    with pytest.raises(BrokenJournal, match="--state-dir"):
        Journal(tmp_path / "j")
    assert (tmp_path / "j" / FILE).read_bytes() == content


def test_a_folder_open_to_others_is_refused(tmp_path):
    (tmp_path / "j").mkdir(mode=0o755)
    with pytest.raises(BrokenJournal, match="chmod 700"):
        Journal(tmp_path / "j")


def test_nothing_is_told_before_the_disk_has_it(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "j")
    synced = threading.Event()
    release = threading.Event()
    real = os.fdatasync

    def slow(handle: int) -> None:
        assert release.wait(60)
        real(handle)
        synced.set()

    monkeypatch.setattr(os, "fdatasync", slow)
    journal.start(lambda text: None)
    order: list[object] = []
    journal.after(lambda: order.append("before"))
    journal.write(instructions(1)[0])
    for number in range(5):
        journal.after(lambda number=number: order.append((number, synced.is_set())))
    time.sleep(0.1)
    assert order == ["before"]
    release.set()
    settled(journal)
    assert order == ["before", *((number, True) for number in range(5))]
    journal.close()


def test_a_file_that_may_not_grow_loses_nothing_and_is_gone_on_with(tmp_path):
    """The limit is a real one of this process, on the size of files."""
    given = instructions(6)
    told: list[str] = []
    journal = Journal(tmp_path / "j")
    journal.start(told.append)
    journal.write(given[0])
    settled(journal)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.nbytes + 300, hard))
    try:
        journal.write(given[1])
        settled(journal)  # it does not wait for room
        assert journal.trouble and told == [journal.trouble]
        assert "File too large" in told[0] and "\n" not in told[0]
        there = read(journal.path.read_bytes(), "it")
        assert set(there.sessions) == {"s1"} and not there.torn_bytes and not there.damage
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    deadline = time.monotonic() + 60
    while told[-1] != "":  # told a moment after the trouble is over
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert journal.trouble == ""
    journal.close()
    again = Journal(tmp_path / "j")
    assert set(again.contents.sessions) == {"s1", "s2"}
    again.close()


def test_it_does_not_grow_without_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("kernel_server.journal.COMPACT_BYTES", 20_000)
    journal = written(tmp_path / "j", instructions(2))
    state = instructions(1)[0]
    largest = 0
    for _ in range(120):
        journal.write(state)
        settled(journal)
        largest = max(largest, journal.path.stat().st_size)
    journal.close()
    assert largest < 30_000
    again = Journal(tmp_path / "j")
    assert set(again.contents.sessions) == {"s1", "s2"}
    again.close()
