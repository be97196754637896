"""A small stand-in for the server's page bookkeeping: who owns which page, copied when written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernel_server.engine.kv_cache import KVCache, choose_page_shape
from kernel_server.engine.segments import ForwardState, Segments
from kernel_server.models.resumable import ResumableModel


@dataclass
class Session:
    """Tokens, page tables by group, and the logits of every finished forward."""

    tokens: list[int]
    tables: list[list[int]]
    computed: int = 0
    forward: ForwardState | None = None
    logits: list[Tensor] = field(default_factory=list)


class Books:
    """Sessions over one pool. Freed pages are poisoned and handed out again at once."""

    def __init__(
        self, model: ResumableModel, *, chunk: int = 6, pages: int = 160, page_tokens: int = 4
    ) -> None:
        layers = [model.observer.layers[index] for index in range(model.num_layers)]
        shape = choose_page_shape(layers, model.dtype, page_tokens=page_tokens, group_layers=4)
        self.cache = KVCache(shape, pages, model.device)
        self.cache.poison(range(pages))
        self.segments = Segments(model, self.cache, prefill_chunk=chunk)
        self.last = model.num_layers + 2
        self.free = list(range(pages))
        self.owners = [0] * pages
        self.copied = 0

    def launch(self, tokens: list[int]) -> Session:
        return Session(list(tokens), [[] for _ in range(self.cache.shape.num_groups)])

    def fork(self, session: Session) -> Session:
        for table in session.tables:
            for page in table:
                self.owners[page] += 1
        forward = session.forward.fork() if session.forward is not None else None
        return Session(
            list(session.tokens),
            [list(table) for table in session.tables],
            session.computed,
            forward,
            list(session.logits),
        )

    def drop(self, session: Session) -> None:
        for table in session.tables:
            for page in table:
                self._release(page)
        session.tables = []

    def move(self, session: Session) -> None:
        """Every page leaves for the host and comes back somewhere else."""
        for table in session.tables:
            kept = [self.cache.pool[page].clone() for page in table]
            for page in table:
                self._release(page)
            table[:] = [self._take() for _ in kept]
            for page, content in zip(table, kept, strict=True):
                self.cache.pool[page].copy_(content)

    def run(self, session: Session, until: int | None = None, stop: int | None = None) -> bool:
        """Run the forward under way, or the next one; True when it is finished.

        until: the point to run to, the logits without. stop: where `on_point` says stop.
        """
        if session.forward is None:
            session.forward = self.segments.begin(
                session.tokens[session.computed :], session.computed
            )
        self._own(session)
        self.segments.advance(
            session.forward,
            self.last if until is None else until,
            session.tables,
            lambda point, _: point == stop,
        )
        if session.forward.point < self.last:
            return False
        logits = self.segments.logits(session.forward)
        session.logits.append(logits)
        session.computed = len(session.tokens)
        session.tokens.append(int(logits.argmax()))
        session.forward = None
        return True

    def generate(self, session: Session, forwards: int) -> Session:
        while len(session.logits) < forwards:
            self.run(session)
        return session

    def _own(self, session: Session) -> None:
        """Pages for this forward's tokens, and none of those written shared with anyone."""
        size = self.cache.shape.page_tokens
        end = session.computed + len(session.forward.token_ids)
        for table in session.tables:
            while len(table) * size < end:
                table.append(self._take())
            for slot in range(session.computed // size, len(table)):
                if self.owners[table[slot]] > 1:
                    page = self._take()
                    self.cache.copy_page(table[slot], page)
                    self._release(table[slot])
                    table[slot] = page
                    self.copied += 1

    def _take(self) -> int:
        page = self.free.pop()
        self.owners[page] = 1
        return page

    def _release(self, page: int) -> None:
        self.owners[page] -= 1
        if self.owners[page] == 0:
            self.cache.poison([page])
            self.free.insert(0, page)


def same_logits(left: Session, right: Session) -> bool:
    """The same tokens, and logits equal in every bit."""
    return left.tokens == right.tokens and torch.equal(
        torch.stack(left.logits), torch.stack(right.logits)
    )


def walk(
    model: ResumableModel,
    stops: Iterable[int],
    chunk: int,
    prompt_tokens: int,
    forwards: int,
    pages: int = 160,
    page_tokens: int = 4,
) -> tuple[Books, list[int]]:
    """Stop at each of `stops` in the prefill and in every second decode, and meanwhile fork, run
    another session, move all pages and forget recordings; then let parent and children go on.

    Returns the books and the stops after which a token or a bit of the logits was another one.
    """
    prompt, other = model.sample_ids(prompt_tokens), model.sample_ids(prompt_tokens - 4, seed=1)
    alone = Books(model, chunk=chunk, pages=pages, page_tokens=page_tokens)
    reference = alone.generate(alone.launch(prompt), forwards)
    books = Books(model, chunk=chunk, pages=pages, page_tokens=page_tokens)
    different = []
    for stop in stops:
        session, company = books.launch(prompt), books.launch(other)
        children = []
        for number in range(forwards):
            # At the last point there is nothing left to go on with.
            finished = books.run(session, stop=stop if number % 2 == 0 else None)
            if not finished:
                children.append(books.fork(session))
                session.forward.drop_cache()
                books.run(company, stop=(stop + 3) % books.last)
                if stop % 2:  # else both write the page they share
                    books.move(session)
                finished = books.run(session)
            assert finished
        for child in children:
            books.generate(child, forwards)
        different += [stop for s in [session, *children] if not same_logits(s, reference)]
        for done in [session, company, *children]:
            books.drop(done)
    return books, different
