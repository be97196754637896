"""Who must wait because they have used more than their part of the server's time.

All owners share one interpreter and one engine thread. While more than one of them is asking, each
may use a part of the server's time at once and a share of it from then on; who has used more has
their next call begun later, so a flood waits for itself and not others for it. An owner who is
alone is never held. Decides how long; measuring and waiting are the callers'.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

#: Time of the server an owner may use at once, seconds.
BURST_S = 0.2
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
        self._lock = threading.Lock()

    def wait_s(self, owner: str) -> float:
        """Seconds until the owner's next call may begin, 0 if it may at once."""
        with self._lock:
            now = self._clock()
            others = sum(
                now - account.asked < self._active_s
                for name, account in self._accounts.items()
                if name != owner
            )
            if not others:
                return 0.0
            share = 1 / (others + 2)  # one part is left for what nobody has asked for
            over_s = self._settle(owner, now, share).used_s - self._burst_s
            return min(over_s / share, LONGEST_S) if over_s > LEAST_S else 0.0

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

    def _settle(self, owner: str, now: float, share: float) -> _Account:
        account = self._of(owner)
        account.used_s = max(0.0, account.used_s - share * (now - account.settled))
        account.settled = now
        return account
