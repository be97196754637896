"""How much of each tier may be used, changed while the server runs.

A budget is never above what was allocated at the start. One that is lowered below what a tier holds
is refused unless the rest has somewhere to go; then the pages leave as copies are made (`leaving`).
Several tiers are changed together: what one may give to another counts once, and where one of them
is refused none is changed.
"""

from __future__ import annotations

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadArgument, NotSupported, OutOfPages
from kernel_server.state.events import Requested
from kernel_server.state.leasing import Leasing
from kernel_server.state.leaving import FLAGS, Leavers
from kernel_server.state.residency import TIERS, Tier


class Budgets(Leasing):
    """Takes requests about budgets."""

    def set_budget(self, event: Requested, request: m.SetBudget) -> None:
        asked: dict[Tier, int] = {
            tier: nbytes for tier in TIERS if (nbytes := getattr(request, tier)) is not None
        }
        if not asked:
            raise BadArgument("name a tier: device, host or disk")
        if self.limits.owners > 1:
            flags = " and ".join(FLAGS[tier] for tier in asked)
            raise NotSupported(
                f"this server has {self.limits.owners} owners, and a budget is everyone's: whoever"
                f" runs it starts it with another {flags}"
            )
        budgets = {tier: self._pages_of(tier, nbytes) for tier, nbytes in asked.items()}
        self._require_somewhere(budgets)
        for tier, pages in budgets.items():
            self.residency.slots[tier].limit(pages)
            self.forgive(tier)
        self.reply(
            event.request_id,
            m.BudgetReply(budgets=tuple(self._described(*budget) for budget in budgets.items())),
        )

    def _pages_of(self, tier: Tier, nbytes: int) -> int:
        """The pages that a budget holds; raises BadArgument for one that cannot be."""
        page, allocated = self.shape.page_bytes, self.allocated(tier)
        pages = nbytes // page
        least = self.shape.num_groups if tier == "device" else 0
        if nbytes < 0 or not least <= pages <= allocated:
            raise BadArgument(
                f"a budget of {nbytes:,} bytes for the {tier} holds {pages} pages of"
                f" {page:,}: give {least * page:,} to {allocated * page:,} bytes, or start the"
                f" server with another {FLAGS[tier]}",
                least=least * page,
                most=allocated * page,
            )
        return pages

    def _described(self, tier: Tier, pages: int) -> m.Budget:
        page = self.shape.page_bytes
        return m.Budget(
            tier=tier,
            nbytes=pages * page,
            used=self.residency.slots[tier].used * page,
            allocated=self.allocated(tier) * page,
        )

    def _require_somewhere(self, budgets: dict[Tier, int]) -> None:
        """Refuse unless what each tier would hold too much can leave it, all of it together."""
        slots = self.residency.slots
        limits = {tier: budgets.get(tier, slots[tier].capacity) for tier in TIERS}
        room = {tier: slots[tier].room_under(limits[tier]) for tier in TIERS}
        over = {tier: max(0, -room[tier]) for tier in TIERS}
        if not any(over[tier] for tier in budgets):
            return
        for tier, can in self._that_can_leave(limits, room, over).items():
            if tier in budgets and over[tier] > can:
                raise OutOfPages(
                    f"{over[tier]} pages would have to leave the {tier} for a budget of"
                    f" {limits[tier]}, and {can} can"
                    + self._what_next(
                        "terminate or unpin a session, or give the tiers below more room first"
                    ),
                    needed=over[tier],
                    free=can,
                    total=slots[tier].capacity,
                    **self._why_refused(),
                )

    def _that_can_leave(
        self, limits: dict[Tier, int], room: dict[Tier, int], over: dict[Tier, int]
    ) -> dict[Tier, int]:
        """How many pages can leave each tier under these limits, where `over` leave the others.

        A page in several tiers can leave all of them but one: what one gives up, the next keeps.
        """
        residency = self.residency
        found = self._leavers() if over["device"] else Leavers()
        gone = {page for page, _ in found.droppable[: over["device"]]}
        device, host, disk = (residency.pages_in[tier] for tier in TIERS)
        still, twice = device - gone - residency.moving, host & disk
        # the host: copies of what stays on the device, those the disk has too, and what it takes
        spare = len((host & still) - disk)
        alone = len(host - disk - device - residency.moving) + len((host - disk) & gone)
        below = len(twice) + min(alone, max(0, room["disk"]))
        # the device: what is copied down needs slots that the host has or gets, beyond its own need
        passage = int(bool(limits["disk"]) and limits["host"] > 1)
        free, needed = max(0, room["host"] - passage), max(0, over["host"] - spare)
        down = 0 if self.refuses("host") else max(0, free + below - needed)
        needed += max(0, over["device"] - len(gone) - found.coming - free)
        # the disk: of what the host has too, and the device not, it keeps what the host gives up
        both = twice - residency.moving - still
        kept = max(0, needed - (len(twice) - len(both)))
        return {
            "host": spare + below,
            "device": len(found.droppable) + found.coming + min(len(found.copyable), down),
            "disk": len(disk & still) + max(0, len(both) - kept),
        }
