"""The methods of a stop that look at what is not kept: computed on the server, on scratch forks.

A scratch fork is seen by nobody: looking publishes nothing, counts no hit and draws no token. Only
the form of the arguments is checked here; what the answers offer is decided by their own classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from djinn_nb.attention import Attention
from djinn_nb.attribution import Attribution
from djinn_nb.captured import Capture
from djinn_nb.checks import shown, whole
from djinn_nb.client import COMPUTE_S, Opened
from djinn_nb.edits import Place, edit_spec
from djinn_nb.metrics import metrics_on
from djinn_nb.model import Model
from djinn_nb.previews import BothLogits, Preview
from djinn_nb.selectors import selector
from djinn_nb.variables import Variable
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadArgument, BadEdit, StaleStop
from kernel_server.protocol.location import parse_location

if TYPE_CHECKING:
    import pandas as pd


class Here(Place, Protocol):
    """A stop, as far as looking at it is concerned."""

    _info: m.SessionInfo
    _stop: m.StopInfo


class Looking:
    """The part of a stop that looks further than its own value."""

    def preview(
        self: Here,
        *edits: Mapping[str, Any],
        top_k: int = 10,
        metric: object = None,
        **edit: Any,
    ) -> Preview:
        """The next token's distribution as it would be with an edit, and as it is; changes nothing.

        edit: the arguments of `stop.edit()`, all of them. edits: for several at once, each as a
        mapping of these. top_k: candidates shown of each. metric: one of `djinn_nb.metrics`, a
        function of logits `[vocabulary]`, or a list of them: computed before and after.

        Both arms keep the session's own edits. Applying the edit and going on gives the same logits
        bit for bit. Raises what `stop.edit()` raises.

            stop.preview(zero=True, location="layers.9.attention.heads", heads=3)
            stop.preview(add=vector, alpha=4, tokens=-1).logits_after
            stop.preview(scale=0, metric=djinn.metrics.LogitDifference(" Mary", " John")).metric
        """
        wishes = [*edits, edit] if edit or not edits else [*edits]
        for one in wishes:
            if not isinstance(one, Mapping):
                raise BadEdit(
                    "several edits are mappings such as dict(scale=0.5, tokens=-1), not"
                    f" {shown(one)}"
                )
        client = self.session.client
        metrics = metrics_on(metric, Model(client))
        if texts := [one.name for one in metrics if one.of != "logits"]:
            raise BadArgument(f"{texts[0]!r} is a metric of a text, and a preview generates none")
        count = whole(top_k, "top_k", least=1)
        version = client.mirror.values_version(self.session.id)

        def ask(logits: bool) -> tuple[m.PreviewReply, BothLogits | None]:
            with Opened(client) as opened:  # large values sent, logits received
                message = m.Preview(
                    session_id=self.session.id,
                    seen=self.number,
                    edits=tuple(edit_spec(self, opened, **one) for one in wishes),
                    top_k=count,
                    logits=logits,
                )
                reply = client.call(message, m.PreviewReply, timeout_s=COMPUTE_S, opens=opened)
                sent = [reply.logits_before, reply.logits_after]
                rows = [client.tensor(one, "logits").reshape(-1) for one in sent if one is not None]
                return reply, (rows[0], rows[1]) if rows else None

        def ask_again() -> BothLogits:
            if client.mirror.values_version(self.session.id) != version:
                raise StaleStop(
                    "the session was edited after this preview, so its logits are not those any"
                    " more: preview again"
                )
            pair = ask(True)[1]
            assert pair is not None
            return pair

        reply, pair = ask(bool(metrics))
        names = [
            ", ".join(f"{key}={_short(value)}" for key, value in one.items()) for one in wishes
        ]
        label = "preview of " + "; ".join(names) + f" at {self.location}"
        return Preview(reply, ask_again, label, pair, metrics)

    def attention(
        self: Here, layer: int | None = None, head: object = None, tokens: object = None
    ) -> Attention:
        """Attention weights of a layer of this forward, `[tokens, heads, keys]`.

        layer: None is the one stopped in or after. head: a number, slice or list; None all of them.
        tokens: a selector as of `edit`; None all tokens of this forward. Recomputed on a scratch
        fork, with the edits made on the way.

        Raises NotSupported where the model shows no weights, BadSelector.

            stop.attention(layer=9).plot()
            stop.attention(head=3).frame(3)
            stop.attention(layer=9, tokens=-1).weights[0].argmax(-1)
        """
        client, number = self.session.client, _layer(self, layer)
        message = m.ReadAttention(
            session_id=self.session.id,
            seen=self.number,
            layer=number,
            heads=selector(head, name="head"),
            tokens=selector(tokens),
        )
        with Opened(client) as opened:
            reply = client.call(message, m.AttentionReply, timeout_s=COMPUTE_S, opens=opened)
            weights = client.tensor(reply.weights, f"attention of layer {number}")
        texts = client.token_texts(self._info.tokens[: self._stop.end_token])
        return Attention(
            number, reply.heads, reply.positions, weights.astype(np.float32, copy=False), texts
        )

    def attribution(
        self: Here, token: str | int | None = None, against: str | int | None = None
    ) -> Attribution:
        """Direct logit attribution: what embedding, heads and MLPs add to the next token's logit.

        token: a text or id; None is the token of the largest logit. against: another token, whose
        parts are taken off: the parts of the difference. With the final norm's scale held fixed,
        after Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021). What comes
        after the stop is computed on a scratch fork.

        Raises BadArgument for a text that is not one token, NotSupported for a head that is not
        linear.

            stop.attribution(" Mary", against=" John").top(5)
            stop.attribution().by_layer()
            stop.attribution().heads.stack().idxmax()
        """
        first = _parts(self, token)
        second = None if against is None else _parts(self, against)
        if second is not None and second.token_id == first.token_id:
            raise BadArgument(
                f"token and against are the same token, id {first.token_id}: name another"
            )
        return Attribution(first, second, self.location, self.session.client.model.dtype)

    def router(self: Here, layer: int | None = None) -> pd.DataFrame:
        """Which experts a mixture of experts chose for each token of this forward.

        layer: None is the one stopped in or after. One row per token and expert chosen: position,
        token, rank (1 is the first choice), expert, weight. Raises NotSupported where the layer has
        no experts.

            stop.router(layer=3).groupby("expert").weight.sum()
            stop.router().query("rank == 1")
            stop.router(layer=3).expert.value_counts()
        """
        client, number = self.session.client, _layer(self, layer)
        message = m.ReadRouter(session_id=self.session.id, seen=self.number, layer=number)
        reply = client.call(message, m.RouterReply, timeout_s=COMPUTE_S)
        ids = self._info.tokens[reply.first_token :][: reply.experts.shape[0]]
        return choices(reply, client.token_texts(ids))

    def capture(self: Here, span: str = "forward") -> Capture:
        """Norms and largest magnitudes of every layer this forward has reached, and NaN counts.

        span: "session" gives all tokens so far, those of earlier forwards too: a row for every
        layer, NaN where this forward has not come yet. `session.capture(locations)` gives values
        anywhere in this forward.

            stop.capture().norm.loc["layers.3.output"]
            stop.capture().num_nan.sum()
        """
        if span not in ("forward", "session"):
            raise BadArgument(f"span is 'forward' or 'session', not {shown(span)}")
        return Capture.of(read_capture(self, span))


def choices(reply: m.RouterReply, texts: Sequence[str]) -> pd.DataFrame:
    """A router's choices as a table, one row per token and expert, the first choice first.

    texts: of the tokens, in order.
    """
    import pandas as pd

    experts, weights = reply.experts.numpy(), reply.weights.numpy().astype(np.float64)
    tokens, chosen = experts.shape
    order = np.argsort(-weights, axis=1, kind="stable")
    return pd.DataFrame(
        {
            "position": np.repeat(np.arange(tokens) + reply.first_token, chosen),
            "token": np.repeat(np.asarray(texts, object), chosen),
            "rank": np.tile(np.arange(1, chosen + 1), tokens),
            "expert": np.take_along_axis(experts, order, 1).reshape(-1).astype(int),
            "weight": np.take_along_axis(weights, order, 1).reshape(-1),
        }
    )


def read_capture(stop: Here, span: str = "forward") -> m.CaptureReply:
    """What the server kept of the forward of a stop, or of the session up to it."""
    message = m.ReadCapture(
        session_id=stop.session.id,
        seen=stop.number,
        span="session" if span == "session" else "forward",
    )
    return stop.session.client.call(message, m.CaptureReply, timeout_s=COMPUTE_S)


def _short(value: object) -> str:
    """An argument in a headline: arrays and tensors by their shape."""
    if isinstance(value, Variable):
        return f"a value of {value.location}"
    shape = getattr(value, "shape", ())
    return f"{type(value).__name__} {list(shape)}" if shape else shown(value)


def _layer(stop: Here, layer: object) -> int:
    """The layer meant: as given, negative ones from the end; None the one stopped in or after."""
    num_layers = stop.session.client.model.num_layers
    if layer is not None:
        number = whole(layer, "layer")
        found = parse_location(number, num_layers).layer
    else:
        found = parse_location(stop.location, num_layers).layer
        if found is None:
            found = 0 if stop.location == "embedding" else num_layers - 1
    assert found is not None
    return found


def _parts(stop: Here, token: object) -> m.AttributionReply:
    text = token if isinstance(token, str) else None
    token_id = None if token is None or text is not None else whole(token, "a token", least=0)
    message = m.ReadAttribution(
        session_id=stop.session.id, seen=stop.number, token_id=token_id, text=text
    )
    return stop.session.client.call(message, m.AttributionReply, timeout_s=COMPUTE_S)
