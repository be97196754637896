"""One number of a next-token distribution, or of a text: what a run is judged by.

A metric is computed here, from logits that were read. It names tokens by id, or by their text,
which must be one token of the model: `on(model)` looks the ids up. What runs are judged, and when,
is decided by whoever holds the metric.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from djinn_nb.checks import shown, whole
from djinn_nb.selectors import plain_array
from kernel_server.protocol.errors import BadArgument

if TYPE_CHECKING:
    from djinn_nb.model import Model

_Floats: TypeAlias = npt.NDArray[np.float64]
_M = TypeVar("_M", bound="Metric")


class Metric:
    """A number computed from logits `[vocabulary]`; call it with them.

    tokens: those it is about, by id or text. Texts are looked up by `on(model)`, which whoever is
    given a metric together with a model calls itself.
    """

    #: what the number is in; shown beside it
    unit = ""
    #: what it is computed from
    of = "logits"

    def __init__(self, *tokens: str | int) -> None:
        self._tokens = tuple(_token(token) for token in tokens)

    @property
    def name(self) -> str:
        """What it is called in a table."""
        raise NotImplementedError

    def on(self: _M, model: Model) -> _M:
        """The same metric with its texts looked up. Raises BadArgument unless each is one token."""
        known = copy.copy(self)
        known._tokens = tuple(
            single_token(model, one) if isinstance(one, str) else _in_vocabulary(one, model)
            for one in self._tokens
        )
        return known

    def __call__(self, logits: object) -> float:
        """The number. Raises BadArgument for what is no row of logits, or holds NaN."""
        return float(self._value(_row(logits), self._ids()))

    def _value(self, logits: _Floats, ids: Sequence[int]) -> float:
        raise NotImplementedError

    def _ids(self) -> list[int]:
        texts = [one for one in self._tokens if isinstance(one, str)]
        if texts:
            raise BadArgument(
                f"the token of {texts[0]!r} is not known yet: metric.on(server.model) looks it up,"
                " or name tokens by id"
            )
        return [one for one in self._tokens if isinstance(one, int)]

    def __repr__(self) -> str:
        unit = f", in {self.unit}" if self.unit else ""
        return f"Metric {self.name}{unit}"


class LogitDifference(Metric):
    """Logit of one token minus that of another.

    metric = LogitDifference(" Mary", " John").on(server.model)
    metric(session.logits)
    """

    unit = "logits"

    def __init__(self, right: str | int, wrong: str | int) -> None:
        super().__init__(right, wrong)
        self._shown = f"logit difference {right!r} − {wrong!r}"

    @property
    def name(self) -> str:
        return self._shown

    def on(self, model: Model) -> LogitDifference:
        """As of any metric. Raises BadArgument too when both are the same token."""
        known = super().on(model)
        if known._tokens[0] == known._tokens[1]:
            raise BadArgument(f"{self.name} is 0 everywhere: both are token {known._tokens[0]}")
        return known

    def _value(self, logits: _Floats, ids: Sequence[int]) -> float:
        first, second = (_logit(logits, one) for one in ids)
        if first == second == -np.inf:
            raise BadArgument("both tokens are banned, so their logits have no difference")
        return first - second


class Probability(Metric):
    """Probability of a token at temperature 1.

    Probability(" Mary").on(server.model)(session.logits)
    """

    unit = "probability"

    def __init__(self, token: str | int) -> None:
        super().__init__(token)
        self._shown = f"probability {token!r}"

    @property
    def name(self) -> str:
        return self._shown

    def _value(self, logits: _Floats, ids: Sequence[int]) -> float:
        _logit(logits, ids[0])
        return float(np.exp(log_softmax(logits)[ids[0]]))


class Rank(Metric):
    """Place of a token among all, 1 for the most probable; among equals the lower id comes first.

    Rank(" Mary").on(server.model)(session.logits)
    """

    unit = "rank"

    def __init__(self, token: str | int) -> None:
        super().__init__(token)
        self._shown = f"rank {token!r}"

    @property
    def name(self) -> str:
        return self._shown

    def _value(self, logits: _Floats, ids: Sequence[int]) -> float:
        own = _logit(logits, ids[0])
        return int((logits > own).sum() + (logits[: ids[0]] == own).sum()) + 1


class KL(Metric):
    """Kullback-Leibler divergence of a distribution from a reference: Σ r · (log r − log p), nats.

    reference: logits `[vocabulary]` of the reference r, as `session.logits` gives them. Infinite
    where the distribution excludes what the reference allows.

        KL(clean.logits)(edited.logits)
    """

    unit = "nats"

    def __init__(self, reference: object) -> None:
        super().__init__()
        self._reference = log_softmax(_row(reference))

    @property
    def name(self) -> str:
        return "KL from the reference"

    def _value(self, logits: _Floats, ids: Sequence[int]) -> float:
        reference = self._reference
        if logits.shape != reference.shape:
            raise BadArgument(
                f"the reference has {len(reference)} logits, this row {len(logits)}: they are of"
                " different models"
            )
        allowed = reference > -np.inf
        part = reference[allowed]
        found = float((np.exp(part) * (part - log_softmax(logits)[allowed])).sum())
        return max(found, 0.0)  # of equal rows rounding may leave -1e-17


class OnText(Metric):
    """A number computed from the generated text by a function of yours.

    cheerful = OnText(lambda text: text.count("happy"), name="happy")
    """

    of = "text"

    def __init__(self, function: Callable[[str], float], *, name: str | None = None) -> None:
        super().__init__()
        if not callable(function):
            raise BadArgument(f"OnText takes a function of a text, not {shown(function)}")
        self._function = function
        self._shown = name or str(getattr(function, "__name__", "text"))

    @property
    def name(self) -> str:
        return self._shown

    def __call__(self, text: object) -> float:
        """The number of this text."""
        if not isinstance(text, str):
            raise BadArgument(f"{self.name} is a metric of a text, not of {shown(text)}")
        return float(self._function(text))


class OnLogits(Metric):
    """A number computed from the logits by a function of yours.

    OnLogits(lambda logits: logits.max(), name="largest")
    """

    def __init__(self, function: Callable[[Any], float], *, name: str | None = None) -> None:
        super().__init__()
        self._function = function
        self._shown = name or str(getattr(function, "__name__", "metric"))

    @property
    def name(self) -> str:
        return self._shown

    def _value(self, logits: _Floats, ids: Sequence[int]) -> float:
        return float(self._function(logits.astype(np.float32)))


def metrics_on(metric: object, model: Model) -> list[Metric]:
    """One metric, or several, ready for a model; a plain function is one of the logits.

    Raises BadArgument for what is none, for texts that are not one token, and for two of one name.
    """
    if metric is None:
        return []
    given = list(metric) if isinstance(metric, (list, tuple)) else [metric]
    found = []
    for one in given:
        if isinstance(one, Metric):
            found.append(one.on(model))
        elif callable(one) and not isinstance(one, type):
            found.append(OnLogits(one))
        else:
            raise BadArgument(
                f"a metric is one of djinn_nb.metrics or a function of logits, not {shown(one)}"
            )
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadArgument(f"two metrics are called {twice[0]!r}: give one of them another name")
    return found


def single_token(model: Model, text: str) -> int:
    """The id of the one token that reads as `text`. Raises BadArgument with the pieces it has.

    A leading space is part of the text: `" Mary"`.
    """
    tokenizer = model.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = tokenizer.tokens(ids)
    if len(ids) == 1 and pieces[0] == text:
        return ids[0]
    # some tokenizers put a space before every text by themselves
    bare = tokenizer.encode(text.removeprefix(" "), add_special_tokens=False)
    if len(bare) == 1 and tokenizer.tokens(bare) == [text]:
        return bare[0]
    hint = ""
    if not text.startswith(" "):
        spaced = tokenizer.encode(f" {text}", add_special_tokens=False)
        if len(spaced) == 1:
            hint = f"; did you mean {' ' + text!r}?"
    raise BadArgument(
        f"{text!r} is {len(ids)} tokens of {model.name} ({' + '.join(map(repr, pieces))}), a metric"
        f" needs exactly one{hint}"
    )


def log_softmax(logits: npt.NDArray[Any]) -> _Floats:
    """Natural logarithm of the probabilities of a row of logits, in float64."""
    row = np.asarray(logits, dtype=np.float64)
    shifted = row - row.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), dtype=np.float64)


def _token(token: object) -> str | int:
    if isinstance(token, str):
        if not token:
            raise BadArgument("an empty text is no token")
        return token
    return whole(token, "a token", least=0)


def _in_vocabulary(token_id: int, model: Model) -> int:
    if token_id >= model.vocab_size:
        raise BadArgument(
            f"token id {token_id} lies outside the vocabulary (0 to {model.vocab_size - 1})"
        )
    return token_id


def _row(logits: object) -> _Floats:
    row = np.asarray(plain_array(logits))
    if row.ndim == 2 and row.shape[0] == 1:
        row = row[0]
    if row.ndim != 1 or not row.size or row.dtype.kind != "f":
        raise BadArgument(
            f"a metric takes the logits of one token, [vocabulary], not {shown(logits)}"
            if row.dtype.kind != "f"
            else f"a metric takes the logits of one token, not an array {list(row.shape)}"
        )
    if broken := int(np.isnan(row).sum()):
        raise BadArgument(f"{broken} of {row.size} logits are NaN, so no metric has a value there")
    if not (row > -np.inf).any() or (row == np.inf).any():
        raise BadArgument("the logits are infinite, so they are no distribution")
    return row.astype(np.float64)


def _logit(logits: _Floats, token_id: int) -> float:
    if token_id >= len(logits):
        raise BadArgument(f"token id {token_id} lies outside the {len(logits)} logits")
    return float(logits[token_id])
