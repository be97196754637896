"""How much of each tier may be used, changed while the server runs.

A budget is never above what was allocated at the start. One that is lowered below what a tier holds
is refused unless the rest has somewhere to go; then the pages leave as copies are made (`leaving`).
"""

from __future__ import annotations

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadArgument, NotSupported, OutOfPages
from kernel_server.state.events import Requested
from kernel_server.state.leasing import Leasing
from kernel_server.state.residency import Tier

_FLAGS = {"device": "--kv-memory", "host": "--host-memory", "disk": "--disk-memory"}


class Budgets(Leasing):
    """Takes requests about budgets."""

    def set_budget(self, event: Requested, request: m.SetBudget) -> None:
        if self.limits.owners > 1:
            raise NotSupported(
                f"this server has {self.limits.owners} owners, and a budget is everyone's: whoever"
                f" runs it starts it with another {_FLAGS[request.tier]}"
            )
        tier, page = request.tier, self.shape.page_bytes
        pages = request.nbytes // page
        allocated = self._allocated(tier)
        least = self.shape.num_groups if tier == "device" else 0
        if request.nbytes < 0 or not least <= pages <= allocated:
            raise BadArgument(
                f"a budget of {request.nbytes:,} bytes for the {tier} holds {pages} pages of"
                f" {page:,}: give {least * page:,} to {allocated * page:,} bytes, or start the"
                f" server with another {_FLAGS[tier]}",
                least=least * page,
                most=allocated * page,
            )
        if (over := self.residency.slots[tier].used - pages) > 0:
            self._require_somewhere(tier, over, pages)
        self.residency.slots[tier].limit(pages)
        self.forgive(tier)
        slots = self.residency.slots[tier]
        self.reply(
            event.request_id,
            m.BudgetReply(
                tier=tier,
                nbytes=pages * page,
                used=slots.used * page,
                allocated=allocated * page,
            ),
        )

    def _allocated(self, tier: Tier) -> int:
        return {
            "device": self.shape.num_device_pages,
            "host": self.shape.num_host_pages,
            "disk": self.shape.num_disk_pages,
        }[tier]

    def _require_somewhere(self, tier: Tier, over: int, pages: int) -> None:
        """Refuse unless so many pages can leave a tier."""
        if tier == "device":
            found = self._leavers()
            can = len(found.droppable) + found.coming + min(len(found.copyable), self.room_below())
        else:
            all_pages = self.residency.pages()
            spare = sum(self.residency.is_spare(page, tier) for page in all_pages)
            can = spare + (self.residency.reclaimable_host() if tier == "host" else 0)
        if over > can:
            raise OutOfPages(
                f"{over} pages would have to leave the {tier} for a budget of {pages}, and {can}"
                " can"
                + self._what_next(
                    "terminate or unpin a session, or give the tiers below more room first"
                ),
                needed=over,
                free=can,
                total=self.residency.slots[tier].capacity,
                **self._why_refused(),
            )
