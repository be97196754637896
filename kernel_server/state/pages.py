"""Which page belongs to whom. Bookkeeping only: integers, no tensors.

A page has as many owners as there are page-table entries that name it (and copies under way that
still read it). Forks share pages by adding owners; a page with two owners is never written: whoever
is about to write takes a fresh page first. Who writes what, and when, is decided by the callers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kernel_server.protocol.errors import OutOfPages, QuotaExceeded
from kernel_server.state.shape import ModelShape

#: Physical pages of one page group, in the order of the tokens they hold.
PageTable = tuple[int, ...]


class PagePool:
    """Hands out page ids and counts their owners, and the pages each tenant holds.

    A page's *tenant* is whose sessions it belongs to: the owner of an access token. Forks stay
    with their tenant, so a page has one however many tables name it.

    per_tenant: most pages of one tenant; None: as many as there are.
    """

    def __init__(self, num_pages: int, per_tenant: int | None = None) -> None:
        self.num_pages = num_pages
        #: None where the pool itself is the limit
        self.per_tenant = None if per_tenant is None or per_tenant >= num_pages else per_tenant
        # a stack, lowest id on top: a page just freed is the next one used
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners = [0] * num_pages
        self._tenants: list[str | None] = [None] * num_pages
        self._held: dict[str, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def owners(self, page: int) -> int:
        """How many own this page; 0 when it is free."""
        return self._owners[page]

    def held(self, tenant: str) -> int:
        """Pages that belong to this tenant, each counted once."""
        return self._held.get(tenant, 0)

    def require(self, count: int, tenant: str = "") -> None:
        """Raise `QuotaExceeded` beyond the tenant's share, `OutOfPages` unless they are free."""
        most, held = self.per_tenant, self.held(tenant)
        if most is not None and count and held + count > most:
            raise QuotaExceeded(
                f"needs {count} pages, and you hold {held} of the {most} that one owner may have:"
                " terminate a session, or start the server with more --kv-per-owner",
                needed=count,
                have=held,
                limit=most,
            )
        if count > len(self._free):
            raise OutOfPages(
                f"needs {count} pages, {len(self._free)} of {self.num_pages} are free; terminate a"
                " session, or start the server with more --kv-memory",
                needed=count,
                free=len(self._free),
                total=self.num_pages,
            )

    def allocate(self, count: int, tenant: str = "") -> list[int]:
        """Take `count` pages, or raise `QuotaExceeded` or `OutOfPages` and take none."""
        self.require(count, tenant)
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._owners[page] = 1
            self._tenants[page] = tenant
        if taken:
            self._held[tenant] = self.held(tenant) + count
        return taken

    def retain(self, pages: Iterable[int]) -> None:
        """Add an owner to each page: half of what a fork takes the state, hence the short loop."""
        owners = self._owners
        for page in pages:
            count = owners[page]
            assert count > 0, f"page {page} is free and cannot be shared"
            owners[page] = count + 1

    def release(self, pages: Iterable[int]) -> list[int]:
        """Drop an owner of each page; returns those that became free."""
        freed = []
        for page in pages:
            assert self._owners[page] > 0, f"page {page} is free already"
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)
                freed.append(page)
                self._leave(page)
        return freed

    def _leave(self, page: int) -> None:
        tenant = self._tenants[page]
        assert tenant is not None, f"page {page} had no tenant"
        self._tenants[page] = None
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]

    def check(self, held: Iterable[int]) -> None:
        """Assert that the owners counted are exactly the entries of `held`."""
        counted = [0] * self.num_pages
        for page in held:
            counted[page] += 1

        assert counted == self._owners, "owners counted differ from page-table entries"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert all(self._owners[page] == 0 for page in self._free), "a free page has an owner"
        assert len(self._free) + sum(n > 0 for n in self._owners) == self.num_pages, (
            "a page is lost"
        )
        tenants = Counter(tenant for tenant in self._tenants if tenant is not None)
        assert dict(tenants) == self._held, "pages counted by tenant differ from their tenants"
        assert all(
            (n > 0) == (t is not None) for n, t in zip(self._owners, self._tenants, strict=True)
        )


@dataclass(frozen=True, slots=True)
class WritePlan:
    """What must happen before a stretch may write: (group, index in its table) of each fresh page,
    those that replace a shared page, and the others."""

    fresh: tuple[tuple[int, int], ...]
    shared: tuple[tuple[int, int], ...]

    @property
    def num_pages(self) -> int:
        return len(self.fresh) + len(self.shared)


NOTHING = WritePlan((), ())


def plan_writes(
    shape: ModelShape,
    pool: PagePool,
    tables: Sequence[PageTable],
    layers: tuple[int, int],
    tokens: tuple[int, int],
) -> WritePlan:
    """The pages that running `layers` over `tokens` (both half-open) has to take first."""
    if layers[0] >= layers[1]:
        return NOTHING
    first = tokens[0] // shape.page_tokens
    end = shape.pages_for(tokens[1])
    fresh: list[tuple[int, int]] | None = None
    shared: list[tuple[int, int]] | None = None
    for group in range(layers[0] // shape.layers_per_group, shape.groups_begun(layers[1])):
        table = tables[group]
        for index in range(first, end):
            if index >= len(table):
                fresh = [] if fresh is None else fresh
                fresh.append((group, index))
            elif pool.owners(table[index]) > 1:
                shared = [] if shared is None else shared
                shared.append((group, index))
    if fresh is None and shared is None:
        return NOTHING
    return WritePlan(tuple(fresh or ()), tuple(shared or ()))
