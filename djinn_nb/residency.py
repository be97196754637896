"""Where a session's pages lie, and having them moved: what is asked here, the server decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from djinn_nb.checks import flag, real, shown
from djinn_nb.client import COMPUTE_S, Client
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadArgument

TIERS = ("device", "host", "disk")


@dataclass(frozen=True, slots=True)
class Residency:
    """How many pages of a session lie in each tier; one that was copied lies in several.

    residency = session.residency
    residency.device, residency.nbytes("host")
    """

    pages: int
    device: int
    host: int
    disk: int
    #: its pages never leave the device
    pinned: bool
    page_bytes: int

    @classmethod
    def of(cls, info: m.SessionInfo) -> Residency:
        """As a description of the session tells it."""
        return cls(
            pages=info.num_pages,
            device=info.device_pages,
            host=info.host_pages,
            disk=info.disk_pages,
            pinned=info.pinned,
            page_bytes=info.kv_bytes // info.num_pages if info.num_pages else 0,
        )

    @property
    def is_resident(self) -> bool:
        """Whether all of them are on the device."""
        return self.device == self.pages

    def nbytes(self, tier: str) -> int:
        """Bytes of its pages in `device`, `host` or `disk`."""
        if tier not in TIERS:
            raise BadArgument(f"a tier is {', '.join(TIERS[:-1])} or {TIERS[-1]}, not {tier!r}")
        return int(getattr(self, tier)) * self.page_bytes

    def __repr__(self) -> str:
        parts = ["1 page" if self.pages == 1 else f"{self.pages} pages"]
        for tier in TIERS:
            if count := getattr(self, tier):
                parts.append(f"{tier} {count} ({self.nbytes(tier) / 2**20:.1f} MiB)")
        return " · ".join([*parts, *(["pinned"] if self.pinned else [])])


class Moving:
    """What a session can ask about its pages. Nothing is lost by any of it."""

    client: Client

    if TYPE_CHECKING:

        @property
        def id(self) -> str: ...

        def refresh(self) -> m.SessionInfo: ...

    @property
    def residency(self) -> Residency:
        """Where its pages lie now, in pages and bytes by tier.

        session.evict()
        session.residency              # 12 pages · host 12 (1.2 MiB)
        """
        return Residency.of(self.refresh())

    def evict(self, to: str = "host") -> Residency:
        """Have its pages leave the device; returns where they lie then.

        to: "host" or "disk". Going on brings them back by itself. Pages that a running fork shares
        stay. Raises NotStopped while it runs, NotSupported without that tier or while it is pinned,
        OutOfPages when there is no room below, or nothing can be written there (a full disk; then
        `details["refused"]` says why): the session stays as it was.

            session.evict(to="disk")
            session.continue_()
        """
        if to not in ("host", "disk"):
            raise BadArgument(f"to is 'host' or 'disk', not {shown(to)}")
        return self._have_moved(m.Evict(session_id=self.id, to=to))  # type: ignore[arg-type]

    def restore(self) -> Residency:
        """Have its pages come to the device, so that going on finds them there.

        Others at rest leave for it where there is too little room, once they are copied. One that
        rests on disk, because its lease ended or its server did, is computed again. Raises
        NotStopped while it runs, OutOfPages when too few others can leave, SessionFailed or
        TornPage when its pages cannot be read back.
        """
        return self._have_moved(m.Restore(session_id=self.id))

    def pin(self, pinned: bool = True) -> None:
        """Keep its pages on the device whoever needs the room, or no longer with `False`.

        A pinned session has no lease, where the server sets one. It is pinned after a restart of
        the server too, and needs no room before it is computed again; a checkpoint is not pinned.

            session.pin()
            session.pin(False)
        """
        self.client.control(m.Pin(session_id=self.id, pinned=flag(pinned, "pinned")))

    def hint(self, *, resume_in_s: float | None) -> None:
        """Say in how many seconds it is to go on, so that its pages are back by then.

        resume_in_s: 0 to 86400; None takes back what was said. A wrong hint costs copies only.
        """
        seconds = None if resume_in_s is None else real(resume_in_s, "resume_in_s")
        self.client.control(m.Hint(session_id=self.id, resume_in_s=seconds))

    def _have_moved(self, message: Any) -> Residency:
        info = self.client.call(message, m.SessionReply, timeout_s=COMPUTE_S).session
        self.client.mirror.update(info)
        return Residency.of(info)
