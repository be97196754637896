"""Who must wait because they have used more of the server's time than the others.

All owners share one interpreter and one engine thread. While several of them are asking, one who
has used more than the others on average, and more than may be used at once, has their next call
begun later, so that a flood waits for itself and not the others for it. Use is forgotten at the
rate of a share of the time, which is what an owner gets who wants more than all others together. An
owner who is alone is never held. Decides how long; measuring and waiting are the callers'.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

#: Time of the server an owner may use at once, seconds.
BURST_S = 0.05
#: How much of the time an owner may use in the long run while others use next to nothing.
SHARE = 1 / 3
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


class Pacer:
    """Keeps what each owner has used lately; safe to use from any thread.

    burst_s, active_s: seconds, as above. clock: seconds, from any beginning.

        pacer = Pacer()
        with pacer.queue("ann"):
            while (wait_s := pacer.wait_s("ann")) > 0:
                time.sleep(wait_s)
            expected_s = pacer.begin("ann")
        pacer.end("ann", expected_s, used_s=0.0002)
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

    def wait_s(self, owner: str) -> float:
        """Seconds until the owner's next call may begin, 0 if it may at once."""
        with self._lock:
            now = self._clock()
            others = [
                self._settled(account, now).used_s
                for name, account in self._accounts.items()
                if name != owner and now - account.asked < self._active_s
            ]
            if not others:
                return 0.0
            used_s = self._settled(self._of(owner), now).used_s
            over_s = used_s - sum(others) / len(others) - self._burst_s
            return min(over_s / SHARE, LONGEST_S) if over_s > LEAST_S else 0.0

    def queue(self, owner: str) -> threading.Lock:
        """The lock to hold while waiting: so an owner's calls begin one after the other."""
        with self._lock:
            return self._queues.setdefault(owner, threading.Lock())

    def begin(self, owner: str) -> float:
        """A call begins: what it will probably use counts from now on. Returns that, seconds."""
        with self._lock:
            account = self._of(owner)
            account.asked = self._clock()
            account.used_s += account.mean_s
            return account.mean_s

    def end(self, owner: str, expected_s: float, used_s: float) -> None:
        """A call that began with `expected_s` has used `used_s` seconds."""
        with self._lock:
            account = self._of(owner)
            account.asked = self._clock()
            account.mean_s += _NEWEST * (used_s - account.mean_s)
            account.used_s = max(0.0, account.used_s + used_s - expected_s)

    def spend(self, owner: str, used_s: float) -> None:
        """Count time that a call has others use, such as the engine's."""
        with self._lock:
            self._of(owner).used_s += used_s

    def _of(self, owner: str) -> _Account:
        found = self._accounts.get(owner)
        if found is None:
            found = self._accounts[owner] = _Account(settled=self._clock())
        return found

    def _settled(self, account: _Account, now: float) -> _Account:
        account.used_s = max(0.0, account.used_s - SHARE * (now - account.settled))
        account.settled = now
        return account
