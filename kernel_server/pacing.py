"""Who must wait because they have used more of the server's time than the others.

All owners share one interpreter and one engine thread. While several of them are asking, one who
has used more than the others on average, and more than may be used at once, has their next call
begun later, so that a flood waits for itself and not the others for it. Use is forgotten at the
rate of a share of the time, which is what an owner gets who wants more than all others together.

An owner whose session runs need not ask for anything, and is held up all the same by what is done
for others meanwhile. That is counted apart, as *taken* from the run, and forgotten at the rate of a
much smaller share, which all who take have together. Who takes more, and more than may be taken at
once, waits likewise; but not for an owner who has taken as much from others' runs. What is used
while no session runs is nobody's loss, but leaves less to be taken at once from the next run.

An owner who is alone is never held. Decides how long; measuring and waiting are the callers'.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

#: Time of the server an owner may use at once, or take from a run, seconds.
BURST_S = 0.05
#: How much of the time an owner may use in the long run while others use next to nothing.
SHARE = 1 / 3
#: How much of the time of a session that runs all other owners may take in the long run. It is to
#: slow down by no more than 10 % while others swap without a pause. A second of the interpreter
#: costs a decode up to 1.7 s, since it gives the interpreter away at each of its operations and
#: waits for it, on a busy host up to 2.3, and the bus costs it some 2 %: 1.02 / (1 - 2.3 * 0.03) =
#: 1.10 (notebooks/LOG.md).
RUN_SHARE = 0.03
#: What is taken from a run, and exceeds what may be taken at once by more than this, is forgotten,
#: seconds: one long answer must not lock its owner out for 33 times as long.
DEBT_S = 0.1
#: An owner who has asked for nothing for this long does not hold others back, seconds.
ACTIVE_S = 1.0
#: Longest wait before it is judged anew, seconds: others may have gone meanwhile.
LONGEST_S = 0.25
#: What is not worth waiting for, seconds.
LEAST_S = 1e-5
#: Weight of the newest call in the mean cost of an owner's calls.
_NEWEST = 0.1


@dataclass(slots=True)
class _Account:
    #: when `used_s` was last brought up to date, and when the owner last asked
    settled: float
    asked: float = float("-inf")
    used_s: float = 0.0
    mean_s: float = 0.0
    #: what others' runs were held up by, or would have been
    taken_s: float = 0.0


class Begun(NamedTuple):
    """What a call that began was expected to use, and to take from another's run; seconds."""

    used_s: float
    taken_s: float


class Pacer:
    """Keeps what each owner has used lately; safe to use from any thread.

    burst_s, active_s: seconds, as above. clock: seconds, from any beginning.

        pacer = Pacer()
        with pacer.queue("ann"):
            while (wait_s := pacer.wait_s("ann")) > 0:
                time.sleep(wait_s)
            begun = pacer.begin("ann")
        pacer.end("ann", begun, used_s=0.0002)
    """

    def __init__(
        self,
        burst_s: float = BURST_S,
        active_s: float = ACTIVE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst_s = burst_s
        self._active_s = active_s
        self._clock = clock
        self._accounts: dict[str, _Account] = {}  # owners are few
        self._queues: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        #: whose session runs, and when what was taken from runs was last brought up to date
        self._runner: str | None = None
        self._settled = clock()

    def runs(self, owner: str | None) -> None:
        """From now on a session of this owner runs; None: no session does."""
        with self._lock:
            self._runner = owner

    def wait_s(self, owner: str) -> float:
        """Seconds until the owner's next call may begin, 0 if it may at once."""
        with self._lock:
            now = self._clock()
            return min(max(self._among_askers(owner, now), self._beside_run(owner, now)), LONGEST_S)

    def _among_askers(self, owner: str, now: float) -> float:
        others = [
            self._settle(account, now).used_s
            for name, account in self._accounts.items()
            if name != owner and now - account.asked < self._active_s
        ]
        if not others:
            return 0.0
        used_s = self._settle(self._of(owner), now).used_s
        over_s = used_s - sum(others) / len(others) - self._burst_s
        return over_s / SHARE if over_s > LEAST_S else 0.0

    def _beside_run(self, owner: str, now: float) -> float:
        if self._runner in (None, owner):
            return 0.0
        takers = self._settle_taken(now)
        over_s = self._of(owner).taken_s - self._of(self._runner).taken_s - self._burst_s
        return over_s * takers / RUN_SHARE if over_s > LEAST_S else 0.0

    def queue(self, owner: str) -> threading.Lock:
        """The lock to hold while waiting: so an owner's calls begin one after the other."""
        with self._lock:
            return self._queues.setdefault(owner, threading.Lock())

    def begin(self, owner: str) -> Begun:
        """A call begins: what it will probably use counts from now on."""
        with self._lock:
            account = self._of(owner)
            account.asked = self._clock()
            begun = Begun(account.mean_s, account.mean_s if self._runner != owner else 0.0)
            account.used_s += begun.used_s
            self._take(account, begun.taken_s)
            return begun

    def end(self, owner: str, begun: Begun, used_s: float) -> None:
        """A call that began has used `used_s` seconds."""
        with self._lock:
            account = self._of(owner)
            account.asked = self._clock()
            account.mean_s += _NEWEST * (used_s - account.mean_s)
            account.used_s = max(0.0, account.used_s + used_s - begun.used_s)
            if begun.taken_s or self._runner != owner:
                self._take(account, used_s - begun.taken_s)

    def spend(self, owner: str, used_s: float) -> None:
        """Count time that a call has others use, such as the engine's."""
        with self._lock:
            self._of(owner).used_s += used_s

    def take(self, owner: str, used_s: float) -> None:
        """Count time in which another owner's session, if one runs, could not go on because of a
        call; of the thread that serves the call it is counted anyway."""
        with self._lock:
            if self._runner != owner:
                self._take(self._of(owner), used_s)

    def left_s(self, owner: str) -> float:
        """What the owner may take at once from another's run now, seconds."""
        with self._lock:
            self._settle_taken(self._clock())
            return max(0.0, self._burst_s - self._of(owner).taken_s)

    def _of(self, owner: str) -> _Account:
        found = self._accounts.get(owner)
        if found is None:
            found = self._accounts[owner] = _Account(settled=self._clock())
        return found

    def _take(self, account: _Account, used_s: float) -> None:
        self._settle_taken(self._clock())
        most_s = self._burst_s + (0.0 if self._runner is None else DEBT_S)
        if used_s > 0:
            used_s = max(0.0, min(used_s, most_s - account.taken_s))
        account.taken_s = max(0.0, account.taken_s + used_s)

    def _settle(self, account: _Account, now: float) -> _Account:
        account.used_s = max(0.0, account.used_s - SHARE * (now - account.settled))
        account.settled = now
        return account

    def _settle_taken(self, now: float) -> int:
        """Forget a share of the time since, in equal parts; how many have taken something still."""
        left_s = RUN_SHARE * (now - self._settled)
        self._settled = now
        takers = sorted((a for a in self._accounts.values() if a.taken_s), key=_taken_s)
        for before, account in enumerate(takers):
            # the least first: what one does not need is for those who have taken more
            part_s = min(account.taken_s, left_s / (len(takers) - before))
            account.taken_s -= part_s
            left_s -= part_s
        return sum(account.taken_s > 0 for account in takers)


def _taken_s(account: _Account) -> float:
    return account.taken_s
