"""What an owner who swaps without a pause takes from a session of another's that runs: a small
share, by the server's own count of the time it spends for them.

The count is of processor time, and the bound a part of the time that went by: a machine that is
busy leaves less to count, never more. So the claim holds on any machine, and what could fail is the
control, which therefore goes on until the bound is passed.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import djinn_nb as djinn
from kernel_server.pacing import BURST_S, DEBT_S, RUN_SHARE
from kernel_server.protocol import messages as m
from tests.djinn_nb.conftest import LONG
from tests.system.test_hostile import EVE, Arena, arena

#: How long eve swaps in the arm that is judged, and how long the control may take, seconds.
SWAPPING_S, CONTROL_S = 6.0, 120.0

#: Has the server note what it spends for eve, and how often a call of hers had to wait; {off}: and
#: hold nobody.
_NOTING = """
import mmap, struct
from kernel_server import pacing
opened = open({board!r}, "r+b")
board, spent, held = mmap.mmap(opened.fileno(), 64), [0.0], [0]
def note(name):
    count = getattr(pacing.Pacer, name)
    def noted(self, owner, *what):
        if owner == "eve":
            spent[0] += what[-1]
            board[:16] = struct.pack("<dq", spent[0], held[0])
        return count(self, owner, *what)
    setattr(pacing.Pacer, name, noted)
for name in ("end", "take"):
    note(name)
judge = pacing.Pacer._beside_run
def judged(self, owner, now):
    wait_s = 0.0 if {off} else judge(self, owner, now)
    held[0] += wait_s > 0
    return wait_s
pacing.Pacer._beside_run = judged
"""


class Swapper:
    """eve's client, with a session of hers that can leave and come back."""

    def __init__(self, where: Arena, board: mmap.mmap) -> None:
        self._board = board
        self.server = djinn.connect(where.address, token=EVE)
        self.session = self.server.launch(list(range(5, 69)), max_new_tokens=3)
        self.session.run_to("logits")
        self.session.run_to("layers.2.output")
        self.swap()  # its pages are below from now on, and nothing is new to anybody

    def swap(self) -> None:
        self.session.evict(to="host")
        self.session.restore()

    def spent_s(self) -> float:
        """What the server has spent for eve so far."""
        return float(struct.unpack("<d", self._board[:8])[0])

    def num_held(self) -> int:
        """How often a call of hers was found to have to wait for a run of ann's."""
        return int(struct.unpack("<q", self._board[8:16])[0])


@pytest.fixture
def served(
    request: pytest.FixtureRequest, model_folder: Path, tmp_path: Path
) -> Iterator[tuple[Arena, Swapper]]:
    """A server whose sessions are ann's, which runs, and one of eve's, who swaps it."""
    file = tmp_path / "board"
    file.write_bytes(bytes(64))
    plant = _NOTING.format(board=str(file), off=request.param == "off")
    with (
        file.open("r+b") as opened,
        mmap.mmap(opened.fileno(), 64) as board,
        arena(model_folder, tmp_path, plant, "--host-memory", "16MiB", "--no-journal") as where,
    ):
        swapper = Swapper(where, board)
        running = where.server.launch(list(range(5, 25)), max_new_tokens=LONG)
        where.server._client.control(m.Continue(session_id=running.id, seen=running.seen))
        yield where, swapper
        assert running.refresh().status == "running"  # all the time
        running.terminate()
        swapper.server.close()


def most_s(seconds: float) -> float:
    """What may be spent for eve within so many seconds: her share, and what she may use at once;
    what came too late to be counted before the next call, besides."""
    return RUN_SHARE * seconds + BURST_S + DEBT_S


@pytest.mark.parametrize("served", ["on"], indirect=True)
def test_swaps_without_a_pause_take_a_small_share_from_anothers_run(
    served: tuple[Arena, Swapper],
) -> None:
    _, swapper = served
    began = time.monotonic()
    while swapper.num_held() == 0 and time.monotonic() - began < CONTROL_S:
        swapper.swap()
    assert swapper.num_held() > 0
    began, before = time.monotonic(), swapper.spent_s()
    while (took_s := time.monotonic() - began) < SWAPPING_S:
        swapper.swap()
    spent_s = swapper.spent_s() - before

    assert 0 < spent_s <= most_s(took_s), (spent_s, took_s)


@pytest.mark.parametrize("served", ["on"], indirect=True)
def test_one_swap_beside_anothers_run_does_not_wait(served: tuple[Arena, Swapper]) -> None:
    _, swapper = served
    for _ in range(4):
        swapper.swap()
        time.sleep(0.5)  # as a person does; all four together are less than may be had at once

    assert swapper.num_held() == 0


@pytest.mark.parametrize("served", ["off"], indirect=True)
def test_control_without_the_pace_the_same_swaps_take_more(
    served: tuple[Arena, Swapper],
) -> None:
    _, swapper = served
    began, before = time.monotonic(), swapper.spent_s()
    while (took_s := time.monotonic() - began) < CONTROL_S:
        swapper.swap()
        if swapper.spent_s() - before > most_s(max(took_s, SWAPPING_S)):
            return
    pytest.fail(f"{swapper.spent_s() - before:.2f} s in {took_s:.0f} s")
