"""Two prompts side by side: which token of one stands for which of the other, and a score between.

Decides what corresponds. Values are compared, and prompts run, by whoever holds an alignment.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from djinn_nb.checks import shown
from djinn_nb.metrics import Metric, metrics_on
from djinn_nb.model import token_id_list
from djinn_nb.selectors import plain_array
from kernel_server.protocol.errors import BadArgument, BadPrompt, BadSelector, NotFinished

if TYPE_CHECKING:
    import pandas as pd

    from djinn_nb.model import Model
    from djinn_nb.server import Server

#: A score divides by the distance of both runs. One that is smaller, as a share of the larger value
#: or on its own, is rounding of float32.
SMALLEST_SHARE, SMALLEST_DISTANCE = 1e-4, 1e-6


class AlignedTokens(NamedTuple):
    """Positions in both prompts, None where one has no counterpart, and what stands there."""

    clean: int | None
    corrupt: int | None
    clean_text: str
    corrupt_text: str
    differs: bool


@dataclass(frozen=True)
class Alignment:
    """Which token of the clean prompt stands for which of the corrupt one; made by `align()`.

    found = djinn.align("Mary gave", "John gave", model=server.model)
    found.differs                    # clean positions whose token is another one
    found.to_corrupt(2)              # position in the corrupt prompt
    """

    clean_ids: tuple[int, ...]
    corrupt_ids: tuple[int, ...]
    rows: tuple[AlignedTokens, ...]
    #: what is worth knowing before it is trusted; None when nothing is
    note: str | None

    @property
    def same_length(self) -> bool:
        """True when every position stands for itself."""
        return len(self.clean_ids) == len(self.corrupt_ids)

    @property
    def differs(self) -> list[int]:
        """Clean positions whose counterpart is another token, or which have none."""
        return [row.clean for row in self.rows if row.differs and row.clean is not None]

    @property
    def positions(self) -> dict[int, int]:
        """Clean position → corrupt position, of all that have a counterpart."""
        return {
            row.clean: row.corrupt
            for row in self.rows
            if row.clean is not None and row.corrupt is not None
        }

    def to_corrupt(self, position: int) -> int:
        """Where a clean position's counterpart stands. Raises BadSelector when it has none."""
        length = len(self.clean_ids)
        wanted = position + length if position < 0 else position
        if not 0 <= wanted < length:
            raise BadSelector(f"position {position} lies outside the {length} tokens")
        found = self.positions.get(wanted)
        if found is None:
            raise BadSelector(
                f"position {wanted} of the clean prompt has no counterpart in the corrupt one: use"
                f" one of {len(self.positions)} that have (alignment.positions)"
            )
        return found

    def frame(self) -> pd.DataFrame:
        """One row for each pair of tokens: positions, texts, and whether they differ."""
        import pandas as pd

        made = pd.DataFrame(list(self.rows), columns=list(AlignedTokens._fields))
        return made.astype({"clean": "Int64", "corrupt": "Int64"})

    def __iter__(self) -> Iterator[AlignedTokens]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        head = (
            f"Alignment of {len(self.clean_ids)} and {len(self.corrupt_ids)} tokens,"
            f" {len(self.positions)} with a counterpart"
        )
        lines = [
            f"  {_place(row.clean, row.clean_text)} | {_place(row.corrupt, row.corrupt_text)}"
            for row in self.rows
            if row.differs
        ]
        note = [] if self.note is None else [f"  note: {self.note}"]
        return "\n".join([head, *lines[:20], *(["  …"] if len(lines) > 20 else []), *note])


def _place(position: int | None, text: str) -> str:
    return "—" if position is None else f"{position} {text!r}"


def align(clean: object, corrupt: object, *, model: Model | None = None) -> Alignment:
    """Align two prompts by their tokens.

    clean, corrupt: texts (which need `model`), lists of token ids, or sessions, whose prompts are
    taken. Of equal length, each position stands for itself, whatever the tokens are. Otherwise runs
    of equal tokens are found (Ratcliff and Obershelp, by difflib); what lies between two runs is
    paired one to one if both sides have as many tokens, and has no counterpart if not.

    Raises BadPrompt, NoTokenizer.

        djinn.align("Mary went", "John went", model=server.model).differs
    """
    model = model or _model_of(clean) or _model_of(corrupt)
    one, two = (_ids(prompt, model) for prompt in (clean, corrupt))
    if len(one) == len(two):
        pairs: list[tuple[int | None, int | None]] = [(i, i) for i in range(len(one))]
    else:
        pairs = list(_matched(one, two))
    texts = _texts(model, [*one, *two])
    rows = tuple(
        AlignedTokens(
            clean=a,
            corrupt=b,
            clean_text="" if a is None else texts[a],
            corrupt_text="" if b is None else texts[len(one) + b],
            differs=a is None or b is None or one[a] != two[b],
        )
        for a, b in pairs
    )
    return Alignment(one, two, rows, _note(one, two, rows))


def _matched(one: tuple[int, ...], two: tuple[int, ...]) -> Iterator[tuple[int | None, int | None]]:
    matcher = difflib.SequenceMatcher(None, one, two, autojunk=False)
    for _, start, end, other_start, other_end in matcher.get_opcodes():
        left, right = range(start, end), range(other_start, other_end)
        if len(left) == len(right):
            yield from zip(left, right, strict=True)
        else:
            yield from ((i, None) for i in left)
            yield from ((None, i) for i in right)


def _note(
    one: tuple[int, ...], two: tuple[int, ...], rows: tuple[AlignedTokens, ...]
) -> str | None:
    same = sum(not row.differs for row in rows)
    if len(one) == len(two):
        matcher = difflib.SequenceMatcher(None, one, two, autojunk=False)
        moved = sum(m.size for m in matcher.get_matching_blocks() if m.a != m.b)
        if moved > same:
            return (
                f"both have {len(one)} tokens, but {moved} equal ones stand at other positions:"
                " positions are paired as they are, so check that this is meant"
            )
    if not same:
        return "no token is the same in both prompts"
    if len(one) == len(two):
        return None
    alone = len(one) + len(two) - 2 * sum(None not in (row.clean, row.corrupt) for row in rows)
    return f"the lengths differ: {alone} tokens have no counterpart"


def _model_of(prompt: object) -> Model | None:
    from djinn_nb.model import Model
    from djinn_nb.session import Session

    return Model(prompt.client) if isinstance(prompt, Session) else None


def _ids(prompt: object, model: Model | None) -> tuple[int, ...]:
    from djinn_nb.session import Session

    if isinstance(prompt, Session):
        ids = prompt.newest.tokens[: prompt.newest.num_prompt_tokens]
    elif isinstance(prompt, str):
        if model is None:
            raise BadPrompt("to align texts pass model=server.model, whose tokens they become")
        ids = tuple(model.tokenizer.encode(prompt))
    else:
        try:
            ids = tuple(token_id_list(prompt))
        except BadArgument:
            raise BadPrompt(
                "a prompt to align is a text, a list of token ids or a session, not"
                f" {shown(prompt)}"
            ) from None
    if not ids:
        raise BadPrompt("a prompt to align is empty: give at least one token")
    return ids


def _texts(model: Model | None, ids: Sequence[int]) -> list[str]:
    if model is None or not model.info.has_tokenizer:
        return [""] * len(ids)
    return model.tokenizer.tokens(ids)


class Pair:
    """A clean and a corrupt prompt with the metric that tells them apart.

    `score()` puts a value between both: 0 is the corrupt run's, 1 the clean run's, so a patch that
    restores the clean behaviour whole scores 1.

    clean, corrupt: prompts (texts or token ids), run by `measure(server)`, or logits `[vocabulary]`
    that are there already.

        pair = djinn.Pair(clean, corrupt, LogitDifference(" Mary", " John")).measure(server)
        pair.score(session.logits)
    """

    def __init__(self, clean: object, corrupt: object, metric: Metric) -> None:
        if not isinstance(metric, Metric) or metric.of != "logits":
            raise BadArgument(f"a pair is judged by a metric of logits, not by {shown(metric)}")
        self.clean, self.corrupt = clean, corrupt
        self.metric = metric
        self.alignment: Alignment | None = None
        self._values: tuple[float, float] | None = None
        rows = [plain_array(one) for one in (clean, corrupt)]
        if all(isinstance(row, np.ndarray) and row.dtype.kind == "f" for row in rows):
            self._take(rows[0], rows[1])

    def measure(self, server: Server) -> Pair:
        """Run both prompts to their first logits and measure them; the sessions are ended again."""
        prompts: list[Any] = [self.clean, self.corrupt]
        (metric,) = metrics_on(self.metric, server.model)
        self.alignment = align(*prompts, model=server.model)
        logits = []
        for prompt in prompts:
            session = server.launch(prompt, max_new_tokens=1)
            try:
                session.continue_()
                found = session.logits
            finally:
                session.terminate()
            assert found is not None
            logits.append(found)
        self.metric = metric
        self._take(logits[0], logits[1])
        return self

    def _take(self, clean: npt.NDArray[Any], corrupt: npt.NDArray[Any]) -> None:
        values = (self.metric(clean), self.metric(corrupt))
        distance = abs(values[0] - values[1])
        least = max(SMALLEST_DISTANCE, SMALLEST_SHARE * max(map(abs, values)))
        if not distance > least or not np.isfinite(distance):
            raise BadArgument(
                f"{self.metric.name} is {values[0]:.6g} in the clean run and {values[1]:.6g} in the"
                " corrupt one: too near each other for a score between them; take prompts or a"
                " metric that tell them apart"
            )
        self._values = values

    @property
    def clean_value(self) -> float:
        """The metric in the clean run."""
        return self._measured()[0]

    @property
    def corrupt_value(self) -> float:
        """The metric in the corrupt run."""
        return self._measured()[1]

    def score(self, of: object) -> float:
        """(value − corrupt) / (clean − corrupt), of a value of the metric or of logits."""
        clean, corrupt = self._measured()
        found = plain_array(of)
        if isinstance(found, (bool, np.bool_)):
            raise BadArgument(f"a score is of a number or of logits, not {shown(of)}")
        if isinstance(found, (int, float, np.integer, np.floating)):
            value = float(found)
        else:
            value = self.metric(found)
        return (value - corrupt) / (clean - corrupt)

    def _measured(self) -> tuple[float, float]:
        if self._values is None:
            raise NotFinished("the pair has not been run: pair.measure(server) runs both prompts")
        return self._values

    def __repr__(self) -> str:
        if self._values is None:
            return f"Pair by {self.metric.name}, not measured"
        clean, corrupt = self._values
        note = None if self.alignment is None else self.alignment.note
        return f"Pair by {self.metric.name}: clean {clean:.4g}, corrupt {corrupt:.4g}" + (
            f" · {note}" if note else ""
        )
