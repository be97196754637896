"""The library of named vectors, without widgets: what is listed, and what is typed to make one.

The list says how a vector was made, where, and whether on the weights that the server has now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from djinn_nb.directions import METHODS
from djinn_nb.panels.edit_model import next_tokens, selection
from djinn_nb.selectors import PHASES
from kernel_server.protocol.errors import BadArgument

if TYPE_CHECKING:
    from djinn_nb.vector_store import VectorStore

#: Strengths of one curve at most; each is two runs.
MOST_ALPHAS = 25
#: Characters of a prompt shown of how a vector was made.
MOST_SHOWN = 60


@dataclass(frozen=True, slots=True)
class VectorRow:
    """A named vector, as the library lists it."""

    name: str
    width: int
    norm: float
    location: str
    method: str
    date: str
    #: made on the weights served, and readable
    usable: bool
    #: why it is not usable; empty where it is
    note: str

    @property
    def text(self) -> str:
        """The vector as a choice."""
        return self.name if self.usable else f"{self.name} ({self.note})"


def rows_of(store: VectorStore) -> tuple[VectorRow, ...]:
    """All vectors of a server; asks it."""
    return tuple(
        VectorRow(
            name=str(row.Index),
            width=int(row.width),
            norm=float(row.norm),
            location=row.location,
            method=row.method.replace("_", " "),
            date=row.date,
            usable=bool(row.usable),
            note=row.note,
        )
        for row in store.frame().itertuples()
    )


def provenance_text(provenance: Mapping[str, Any]) -> str:
    """How a vector was made, in a line: long lists of prompts by their first and their number.

    >>> provenance_text({"method": "stop", "tokens": 3, "forward": 0})
    'stop · tokens 3 · forward 0'
    """
    parts = []
    first = [name for name in ("method", "tokens", "positive", "negative") if name in provenance]
    for name in dict.fromkeys([*first, *provenance]):
        value = provenance[name]
        if isinstance(value, Mapping):  # too long to be kept whole
            value = f"{value.get('count')} prompts, sha256 {str(value.get('sha256'))[:12]}"
        elif isinstance(value, list):
            more = f" and {len(value) - 1} more" if len(value) > 1 else ""
            value = f"{_short(value[0])}{more}" if value else "none"
        text = str(value).replace("_", " ") if name == "method" else str(value)
        parts.append(text if name == "method" else f"{name.replace('_', ' ')} {text}")
    return " · ".join(parts)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} …"


@dataclass(slots=True)
class LibraryModel:
    """What is typed to make, keep or measure a vector.

    >>> LibraryModel(name="joy", alphas="-2, 0, 2").curve("joy")
    {'name': 'joy', 'alphas': [-2.0, 0.0, 2.0]}
    """

    name: str = ""
    #: prompts, one a line
    positive: str = ""
    negative: str = ""
    #: empty: where the session stands
    location: str = ""
    method: str = METHODS[0]
    tokens: str = "-1"
    replace: bool = False
    alphas: str = ""
    token_text: str = ""
    chosen_token: int | None = None

    def from_prompts(self) -> dict[str, Any]:
        """Arguments of the verb `make_vector`; raises BadArgument or BadSelector."""
        found: dict[str, Any] = {
            "name": self._name(),
            "positive": lines_of(self.positive),
            "negative": lines_of(self.negative),
        }
        for side in ("positive", "negative"):
            if not found[side]:
                raise BadArgument(f"write at least one {side} prompt, one a line")
        if self.location.strip():
            found["location"] = _location(self.location)
        if self.method != METHODS[0]:
            found["method"] = self.method
        return found | self._options()

    def from_stop(self) -> dict[str, Any]:
        """Arguments of the verb `keep_vector`; raises BadArgument or BadSelector."""
        return {"name": self._name(), **self._options()}

    def curve(self, name: str | None) -> dict[str, Any]:
        """Arguments of the verb `strength_curve` of a vector; raises BadArgument."""
        if not name:
            raise BadArgument("choose the vector first")
        found: dict[str, Any] = {"name": name, "alphas": numbers(self.alphas)}
        if self.token_text.strip():
            found["token"] = next_tokens(self.token_text, several=False)
        return found

    def _name(self) -> str:
        if not self.name.strip():
            raise BadArgument("write a name for the vector, such as joy")
        return self.name.strip()

    def _options(self) -> dict[str, Any]:
        if not self.tokens.strip():
            raise BadArgument("tokens: write a position, a slice (3:7), a list, or a token's text")
        tokens = selection(self.tokens, "tokens", words=PHASES, chosen=self.chosen_token)
        return {"tokens": tokens, **({"replace": True} if self.replace else {})}


def lines_of(text: str) -> list[str]:
    """Prompts, one a line; a line of spaces is none, spaces of the others belong to them.

    >>> lines_of("I am glad\\n\\n I am happy")
    ['I am glad', ' I am happy']
    """
    return [line for line in text.splitlines() if line.strip()]


def numbers(text: str) -> list[float]:
    """Strengths, separated by commas or spaces; raises BadArgument.

    >>> numbers("-2, 0 2")
    [-2.0, 0.0, 2.0]
    """
    try:
        found = [float(one) for one in text.replace(",", " ").split()]
    except ValueError:
        found = []
    if not found:
        raise BadArgument(f"strengths: write numbers, such as -4, 0, 4, not {text[:40]!r}")
    if len(found) > MOST_ALPHAS:
        raise BadArgument(f"strengths: {len(found)} are written, {MOST_ALPHAS} is the most here")
    return found


def _location(text: str) -> int | str:
    bare = text.strip()
    return int(bare) if bare.removeprefix("-").isdecimal() and len(bare) < 10 else bare
