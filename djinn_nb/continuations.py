"""Several continuations from one stop, before and after an edit: what the edit does to the text.

Each runs in a fork of its own that is ended again; the session itself stays where it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from djinn_nb.checks import real, shown, whole
from djinn_nb.progress import Progress
from kernel_server.protocol.errors import BadArgument, StaleStop

if TYPE_CHECKING:
    import pandas as pd

    from djinn_nb.session import Session

#: Most continuations of each arm.
MAX_CONTINUATIONS = 1000


class Place(Protocol):
    """A stop, as far as forks of it are concerned."""

    session: Session

    @property
    def number(self) -> int: ...


class Continuing:
    """The part of a stop that goes on from it in forks."""

    def continuations(
        self: Place,
        n: int,
        seed: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        *,
        max_new_tokens: int | None = None,
        edit: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> pd.DataFrame:
        """The greedy continuation and `n` sampled ones from here; with `edit`, also after it.

        seed: of the first, the others count up; both arms draw with the same seeds. edit: what
        `stop.edit` takes, as a dict, or several. max_new_tokens: as at launch, so tokens that are
        there already count; None for the session's own. Breakpoints do not stop the forks.

        Returns one row per run: arm ("before", "after"), seed (missing for the greedy one), text,
        tokens (how many), token_ids, and differs_at: the first position at which the run after the
        edit has another token than the one before it with the same seed; missing where none has.

        Raises StaleStop once the session has moved on, QuotaExceeded, BadArgument and what the edit
        raises; no fork is left then.

            stop.continuations(4, seed=1, edit=dict(scale=0, tokens=-1))
        """
        count = whole(n, "n", least=0)
        if count > MAX_CONTINUATIONS:
            raise BadArgument(f"n is {count}: give at most {MAX_CONTINUATIONS}")
        if count and not real(temperature, "temperature") > 0:
            raise BadArgument(
                f"temperature is {shown(temperature)}: sampled continuations need more than 0; the"
                " greedy one is always there, n=0 gives it alone"
            )
        first = whole(seed, "seed", least=0)
        wishes = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
        greedy = {"temperature": 0.0, "max_new_tokens": max_new_tokens}
        runs = [(None, greedy), *((first + i, wishes | {"seed": first + i}) for i in range(count))]
        edits = _edits(edit)
        rows: list[dict[str, Any]] = []
        total = len(runs) * (2 if edits else 1)
        with Progress("continuations", unit="run") as progress:
            for number, sampling in runs:
                before = _continue(self, sampling, [])
                rows.append(_row(self, "before", number, before, None))
                if edits:
                    after = _continue(self, sampling, edits)
                    rows.append(_row(self, "after", number, after, before))
                progress.at(len(rows), total)
        return _frame(rows)


def _edits(edit: object) -> list[dict[str, Any]]:
    if edit is None:
        return []
    given = [edit] if isinstance(edit, Mapping) else edit
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise BadArgument(f"edit is a dict of what stop.edit takes, or several, not {shown(edit)}")
    if wrong := [one for one in given if not isinstance(one, Mapping)]:
        raise BadArgument(f"edit is a dict of what stop.edit takes, not {shown(wrong[0])}")
    return [dict(one) for one in given]


def _continue(place: Place, sampling: dict[str, Any], edits: list[dict[str, Any]]) -> list[int]:
    """Token ids of a fork run to its end."""
    from djinn_nb.runs import ended, run_out

    with ended(place.session.fork(**sampling, name="continuation")) as child:
        stop = child.stop
        if stop is None or stop.number != place.number:
            raise StaleStop(
                f"session {place.session.id} has moved on since stop {place.number}: continue from"
                " the stop it stands at (session.stop)",
                seen=place.number,
            )
        for point in child.breakpoints:
            point.remove()
        for one in edits:
            stop.edit(**one)
        return run_out(child).tokens


def _row(
    place: Place, arm: str, seed: int | None, tokens: list[int], other: list[int] | None
) -> dict[str, Any]:
    newest = place.session.newest
    known = len(newest.tokens)
    differs = None
    if other is not None and tokens != other:
        pairs = zip(tokens, other, strict=False)
        shortest = min(len(tokens), len(other))
        differs = next((i for i, (one, two) in enumerate(pairs) if one != two), shortest)
    return {
        "arm": arm,
        "seed": seed,
        "text": place.session.client.text_of(tokens[known:]) if len(tokens) > known else "",
        "tokens": len(tokens) - known,
        "token_ids": tuple(tokens[known:]),
        "differs_at": differs,
    }


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    columns = ["arm", "seed", "text", "tokens", "token_ids", "differs_at"]
    return pd.DataFrame(rows, columns=columns).astype({"seed": "UInt64", "differs_at": "Int64"})
