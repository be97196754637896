"""The training text: a seeded mix of the four kinds of document.

Decides the mix. Text comes in shards of a fixed size, each with its own seed, so any number of
processes makes the same text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from . import facts, indirect, repeats, stories

SHARD = 20_000
"""Documents in one shard."""

MIX: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (indirect.document, 40),
    (facts.document, 26),
    (stories.document, 22),
    (repeats.document, 12),
)
"""Each kind of document with its share in percent."""


def documents(seed: int, shard: int, count: int = SHARD) -> Iterator[str]:
    """Yield the first `count` documents of one shard.

    Example:
        >>> list(documents(0, 3, 2)) == list(documents(0, 3, 2))
        True
    """
    rng = random.Random(f"documents {seed} {shard}")
    makers = [maker for maker, _ in MIX]
    for maker in rng.choices(makers, [share for _, share in MIX], k=count):
        yield maker(rng)
