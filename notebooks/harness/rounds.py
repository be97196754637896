"""Things compared by turns, in many short rounds: a machine's own pace moves within seconds.

Each ratio is that of two figures of one round; a round begins with another of them each time, so
that what comes first is not always the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean, median, quantiles


def by_turns(names: Sequence[str], rounds: int) -> Iterator[tuple[str, ...]]:
    """The order of each round.

    >>> list(by_turns("ab", 3))
    [('a', 'b'), ('b', 'a'), ('a', 'b')]
    """
    order = tuple(names)
    for number in range(rounds):
        first = number % len(order)
        yield order[first:] + order[:first]


def ratios(found: Sequence[float], base: Sequence[float]) -> list[float]:
    """Of each round, the one ÷ the other."""
    return [a / b for a, b in zip(found, base, strict=True)]


def beside_base(visits: Sequence[tuple[int, float]], base: int) -> list[tuple[int, float]]:
    """Of each visit to something else than the base, its figure ÷ the mean of those of the base
    visited last before it and first after it; the first and the last visit are to the base.

    >>> beside_base([(0, 1.0), (16, 3.0), (0, 2.0)], base=0)
    [(16, 2.0)]
    """
    found = []
    for place, (what, value) in enumerate(visits):
        if what != base:
            before = next(v for w, v in reversed(visits[:place]) if w == base)
            after = next(v for w, v in visits[place:] if w == base)
            found.append((what, value / mean((before, after))))
    return found


def told(values: Sequence[float]) -> str:
    """The median, and between which values all but a tenth below and a tenth above lie.

    >>> told([1.0, 1.1, 1.2])
    '1.1 [1.02 .. 1.18]'
    """
    if len(values) == 1:
        return f"{values[0]:.3g}"
    tenths = quantiles(values, n=10, method="inclusive")
    return f"{median(values):.3g} [{tenths[0]:.3g} .. {tenths[-1]:.3g}]"
