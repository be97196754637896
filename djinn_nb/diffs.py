"""Two nodes compared, as `session.diff()` and `stop.diff()` give it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from djinn_nb import cards
from djinn_nb.checks import flag, shown, whole
from djinn_nb.client import COMPUTE_S, Client
from djinn_nb.selectors import selector
from djinn_nb.stopped import Finished, Stopped
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadArgument, NotSupported, WrongModel

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from djinn_nb.session import Session

#: what `plot` draws -> its label
_DRAWN = {
    "difference": "L2 norm of the difference",
    "cosine": "1 − cosine",
    "kl": "KL of the logit lens, nats",
}


class Divergence(NamedTuple):
    """A place where two runs part: forward, location, position and text of the token."""

    forward: int
    location: str
    position: int
    token: str


class Diff:
    """How two runs differ, by layer and token: the residual stream after every layer.

    `changed` (elements whose bits differ), `cosine`, `difference` (L2 norm of other − this),
    `norm_change` (L2 norm of other less that of this) and `kl` (nats, of the other's logit lens
    from this one's) are DataFrames, one row per location, one column per position.
    `first_divergence`: the first place, in the order of a run, where a bit differs; None where
    none does. `tokens`: the tokens that differ.

        found = session.diff(first, second)
        found.first_divergence
        found.frame().nlargest(5, "kl")
        found.plot()
    """

    def __init__(self, reply: m.DiffReply, labels: tuple[str, str], texts: dict[int, str]) -> None:
        import pandas as pd

        index = pd.Index(reply.locations, name="location")
        columns = pd.Index(reply.positions, name="position", dtype=int)

        def table(values: npt.NDArray[Any]) -> pd.DataFrame:
            return pd.DataFrame(values, index=index, columns=columns)

        self._reply, self._labels, self._texts = reply, labels, texts
        changed = reply.changed.numpy()
        self._compared = changed >= 0
        self.changed: pd.DataFrame = table(changed).where(self._compared)
        self.cosine: pd.DataFrame = table(reply.cosine.numpy())
        self.difference: pd.DataFrame = table(reply.difference.numpy())
        self._norm = table(reply.norm.numpy())
        self.norm_change: pd.DataFrame = table(reply.other_norm.numpy()) - self._norm
        self.kl: pd.DataFrame = table(reply.kl.numpy())

    @property
    def is_same(self) -> bool:
        """Whether no bit differs, of streams and of tokens."""
        return self.first_divergence is None and self.tokens.empty

    @property
    def first_divergence(self) -> Divergence | None:
        """Forward, location, position and token of the first difference; None without one."""
        rows, columns = (self._reply.changed.numpy() > 0).nonzero()
        if not len(rows):
            return None
        positions = np.asarray(self._reply.positions)[columns]
        forwards = np.maximum(0, positions - self._reply.num_prompt_tokens + 1)
        first = np.lexsort((positions, rows, forwards))[0]
        position = int(positions[first])
        return Divergence(
            int(forwards[first]),
            self._reply.locations[rows[first]],
            position,
            self._text(self._reply.token_ids[position]),
        )

    @property
    def tokens(self) -> pd.DataFrame:
        """Positions at which the two have other tokens: token_id, token, other_token_id,
        other_token; over the tokens that both have."""
        import pandas as pd

        pairs = zip(self._reply.token_ids, self._reply.other_token_ids, strict=False)
        rows = [
            {
                "position": position,
                "token_id": one,
                "token": self._text(one),
                "other_token_id": other,
                "other_token": self._text(other),
            }
            for position, (one, other) in enumerate(pairs)
            if one != other
        ]
        names = ["position", "token_id", "token", "other_token_id", "other_token"]
        return pd.DataFrame(rows, columns=names).set_index("position")

    def frame(self) -> pd.DataFrame:
        """A row per location and token compared: forward, location, position, token, other_token,
        changed, cosine, difference, norm, norm_change, kl."""
        import pandas as pd

        rows, columns = self._compared.nonzero()
        positions = np.asarray(self._reply.positions, int)[columns]
        ids, others = self._reply.token_ids, self._reply.other_token_ids

        def cells(table: pd.DataFrame) -> npt.NDArray[Any]:
            found: npt.NDArray[Any] = table.to_numpy()[rows, columns]
            return found

        found = pd.DataFrame(
            {
                "forward": np.maximum(0, positions - self._reply.num_prompt_tokens + 1),
                "location": np.asarray(self._reply.locations, object)[rows],
                "position": positions,
                "token": [self._text(ids[p]) for p in positions],
                "other_token": [self._text(others[p]) for p in positions],
                "changed": cells(self.changed).astype(int),
                "cosine": cells(self.cosine),
                "difference": cells(self.difference),
                "norm": cells(self._norm),
                "norm_change": cells(self.norm_change),
                "kl": cells(self.kl),
            }
        )
        order = np.lexsort((positions, rows, found["forward"].to_numpy()))
        return found.iloc[order].reset_index(drop=True)

    def plot(self, what: str = "difference") -> Figure:
        """A heat map over layers and tokens, with the first divergence marked.

        what: "difference" (L2 norm of the difference), "cosine" (1 − cosine) or "kl" (nats).
        """
        from djinn_nb.plots import mark, norm_heat_map

        if what not in _DRAWN:
            raise BadArgument(f"what is 'difference', 'cosine' or 'kl', not {shown(what)}")
        values = {"difference": self.difference, "cosine": 1 - self.cosine, "kl": self.kl}[what]
        positions = list(self._reply.positions)
        figure = norm_heat_map(
            values.to_numpy(),
            self._reply.locations,
            positions,
            [self._text(self._reply.token_ids[p]) for p in positions],
            title=f"{self._labels[1]} beside {self._labels[0]}",
            label=_DRAWN[what],
        )
        if (first := self.first_divergence) is not None:
            row = self._reply.locations.index(first.location)
            mark(figure, row, positions.index(first.position), len(positions), "first divergence")
        return figure

    @property
    def notes(self) -> list[str]:
        """What was not compared, and why."""
        reply, found = self._reply, []
        if (
            reply.token_ids[: reply.num_prompt_tokens]
            != (reply.other_token_ids[: reply.other_num_prompt_tokens])
        ):
            found.append(
                f"the prompts differ ({reply.num_prompt_tokens} and"
                f" {reply.other_num_prompt_tokens} tokens): compared position by position"
            )
        if reply.first_token:
            found.append(f"tokens 0 to {reply.first_token - 1} are of a common past")
        if (missing := int((~self._compared).sum())) > 0:
            found.append(f"{missing} places are NaN: one of the two has not run there")
        if reply.lens_tokens is not None:
            found.append(f"kl of the last {reply.lens_tokens} tokens only, NaN for the others")
        return found

    def _text(self, token_id: int) -> str:
        return self._texts.get(token_id, "")

    @property
    def _headline(self) -> str:
        rows, columns = self.changed.shape
        where = (
            f"Diff of {self._labels[0]} and {self._labels[1]},"
            f" {_counted(rows, 'location')} × {_counted(columns, 'token')}"
        )
        drawn = f"{_counted(len(self.tokens), 'token')} drawn otherwise"
        if (first := self.first_divergence) is None:
            return f"{where}: no divergence" + (f", {drawn}" if len(self.tokens) else "")
        text = f" {first.token!r}" if first.token else ""
        places = _counted(int((self.changed > 0).to_numpy().sum()), "place")
        return (
            f"{where}: first divergence at {first.location}, forward {first.forward}, token"
            f" {first.position}{text}; {places} unlike, {drawn}"
        )

    def __repr__(self) -> str:
        return "; ".join([self._headline, *self.notes])

    def _repr_html_(self) -> str:
        return cards.card(
            repr(self),
            cards.heading(self._headline),
            cards.image(self.plot(), repr(self)),
            cards.note(
                "; ".join([*self.notes, ".frame(), .first_divergence, .tokens, .plot('kl')"])
            ),
        )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def diff(session: Session, one: object, other: object, tokens: object, lens: object) -> Diff:
    """Compare two places, each a node of `session`, or a stop, an end or a session of its own."""
    (first, number), (second, other_number) = (_place(session, it) for it in (one, other))
    _require_one_server(first, second)
    message = m.ReadDiff(
        session_id=first.id,
        node=number,
        other_id=second.id,
        other_node=other_number,
        tokens=selector(tokens),
        lens=flag(lens, "lens"),
    )
    client = first.client
    reply = client.call(message, m.DiffReply, timeout_s=COMPUTE_S)
    ids = (*reply.token_ids, *reply.other_token_ids)
    texts = dict(zip(ids, client.token_texts(ids), strict=True))
    label, other_label = (
        f"node {where} of {it.id}" for it, where in ((first, number), (second, other_number))
    )
    return Diff(reply, (label, other_label), texts)


def _place(session: Session, it: object) -> tuple[Session, int]:
    """The session meant, and the number of its node or stop."""
    from djinn_nb.session import Session

    if isinstance(it, Session):
        return it, it.seen
    if isinstance(it, Stopped):
        return it.session, it.number
    if isinstance(it, Finished):
        return it.session, it.number
    if isinstance(it, m.NodeInfo):
        return session, it.number
    return session, whole(it, "a node", least=0)


def _require_one_server(one: Session, other: Session) -> None:
    ours: Client = one.client
    theirs: Client = other.client
    if ours.identity == theirs.identity:
        return
    names = ours.model.name, theirs.model.name
    weights = [client.model.fingerprint.get("weights") for client in (ours, theirs)]
    if weights[0] != weights[1]:
        raise WrongModel(
            f"session {one.id} is of {names[0]}, session {other.id} of {names[1]}: a diff is of one"
            " model, so launch both prompts on one server"
        )
    raise NotSupported(
        f"sessions {one.id} and {other.id} are on two servers, and a diff is computed beside the"
        " sessions: launch both prompts on one"
    )
