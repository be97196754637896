"""What a person wants changed, without widgets: which fields a kind needs, and what they ask for.

`EditModel` holds the fields as they are typed and chosen, and makes of them a verb with arguments;
what a verb does, and its Python, is decided in `edit_verbs`.
"""

from __future__ import annotations

import ast
import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from djinn_nb.selectors import PHASES, selector
from djinn_nb.sites import PATTERN, layout_at, shape_at
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadArgument
from kernel_server.protocol.location import parse_location
from kernel_server.protocol.snapshot import Snapshot

#: A slider: its least, most, start and step.
Span: TypeAlias = tuple[float, float, float, float]

_TARGET = ("tokens", "heads", "channels")
_ADDED: Span = (-16.0, 16.0, 0.0, 0.25)
_NUMBER: Span = (-16.0, 16.0, 0.0, 0.25)


@dataclass(frozen=True, slots=True)
class Kind:
    """What one kind of change asks of a person."""

    #: names of fields of `EditModel`, in the order shown
    fields: tuple[str, ...]
    verb: str = "edit"
    #: of the slider of its strength
    span: Span | None = None
    #: what the strength is
    strength: str = ""
    #: why it cannot be sticky
    once: str = ""


#: name -> what it asks; at a tensor with a vector per token
KINDS: dict[str, Kind] = {
    "scale": Kind(("strength", *_TARGET), span=(-2.0, 4.0, 1.0, 0.05), strength="the factor"),
    "add a vector": Kind(
        ("vector", "strength", "tokens"), span=_ADDED, strength="times the vector"
    ),
    "add a number": Kind(("strength", *_TARGET), span=_NUMBER, strength="the number added"),
    "set to a number": Kind(("strength", *_TARGET), span=_NUMBER, strength="the number set"),
    "zero": Kind(_TARGET),
    "clamp": Kind(
        ("strength", "least", "largest", *_TARGET),
        span=(0.0, 20.0, 20.0, 0.1),
        strength="sets both bounds",
    ),
    "project out a vector": Kind(("vector", "tokens")),
    "mean over tokens": Kind(_TARGET, once="it looks at several tokens of one forward"),
    "swap two tokens": Kind(
        ("first", "second", "heads", "channels"),
        once="it looks at two tokens of one forward",
    ),
    "patch": Kind(("source", "rows", *_TARGET), verb="patch"),
    "ablate heads": Kind(("layer", "ablated", "mean", "tokens"), verb="ablate"),
    "ablate neurons": Kind(("layer", "ablated", "mean", "tokens"), verb="ablate"),
    "force": Kind(("token_text",)),
    "ban": Kind(("token_text",)),
    "replace": Kind(("token_text", "instead")),
}
#: of the next token, at `logits`
TOKEN_KINDS = ("force", "ban", "replace")
OF_VECTORS = ("add a vector", "project out a vector")
#: kind -> the word of `stop.ablate()` and the site it empties
ABLATIONS = {
    "ablate heads": ("heads", "attention.heads"),
    "ablate neurons": ("neurons", "mlp.neurons"),
}
#: Kinds that look at several tokens; at `logits` there is one.
_OF_SEVERAL = ("mean over tokens", "swap two tokens")


@dataclass(frozen=True, slots=True)
class Target:
    """The tensor at a place, as far as choosing its parts goes."""

    location: str
    #: in words: `[tokens, 12 heads, 64]`
    shape: str
    heads: int | None
    #: channels, of a head where there are heads; None: as many as there are keys
    width: int | None
    #: kind of ablation -> the layers it can still reach
    ahead: Mapping[str, tuple[int, ...]]

    @classmethod
    def at(cls, model: m.ModelInfo, location: str) -> Target:
        """What the model has at a location."""
        layout = layout_at(model, location)
        here = parse_location(location, model.num_layers).point(model.num_layers)
        ahead = {
            kind: tuple(
                layer
                for layer in range(model.num_layers)
                if layout_at(model, place := f"layers.{layer}.{site}") is not None
                and parse_location(place, model.num_layers).point(model.num_layers) >= here
            )
            for kind, (_, site) in ABLATIONS.items()
        }
        width: int | None = model.vocab_size if location == "logits" else model.hidden_size
        if layout is not None:
            width = None if layout.site == PATTERN else layout.width
        return cls(
            location=location,
            shape=shape_at(model, location),
            heads=None if layout is None else layout.heads,
            width=width,
            ahead=ahead,
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that make sense here, those of the next token first."""
        at_logits = self.location == "logits"
        found = [*TOKEN_KINDS] if at_logits else []
        for kind in KINDS:
            if kind in TOKEN_KINDS:
                continue
            if kind in OF_VECTORS and (at_logits or self.width is None):
                continue
            if kind in _OF_SEVERAL and at_logits:
                continue
            if kind in ABLATIONS and not self.ahead[kind]:
                continue
            found.append(kind)
        return tuple(found)

    def off(self, kind: str) -> dict[str, str]:
        """Fields of a kind that cannot be used here, each with the reason."""
        found = {}
        asked = KINDS[kind]
        if "heads" in asked.fields and self.heads is None:
            found["heads"] = f"{self.location} has no heads: it is {self.shape}"
        if "channels" in asked.fields and self.width is None:
            found["channels"] = f"{self.location} has keys, as many as tokens, and no channels"
        if asked.once:
            found["sticky"] = asked.once
        return found


@dataclass(slots=True)
class EditModel:
    """What the person wants changed, as the widgets hold it.

    >>> EditModel(kind="scale", strength=0.9, tokens="-1").wishes()
    {'scale': 0.9, 'tokens': -1}
    """

    kind: str = "scale"
    strength: float = 1.0
    #: texts as typed: see `selection`
    tokens: str = "-1"
    heads: str = ""
    channels: str = ""
    vector: str | None = None
    #: take a vector that was made on another model
    inexact: bool = False
    #: of clamp; empty: no bound
    least: str = ""
    largest: str = ""
    #: of swap
    first: str = ""
    second: str = ""
    #: of an ablation: the layer, its heads or neurons, the mean instead of 0
    layer: int | None = None
    ablated: str = ""
    mean: bool = False
    #: of a patch: the id of a session or the number of a node, and which of its tokens
    source: str | int | None = None
    rows: str = ""
    #: of `force`, `ban` and `replace`: the token's text
    token_text: str = ""
    instead: str = ""
    sticky: bool = False
    #: what `chosen` means: the token and the head that the panels look at together
    chosen_token: int | None = None
    chosen_head: int | None = None

    @property
    def verb(self) -> str:
        """The verb that carries it out, with `wishes()` as its arguments."""
        return self._kind.verb

    @property
    def follows_the_choice(self) -> bool:
        """Whether it is about what is chosen in the panels, and changes with that."""
        shown = [getattr(self, name) for name in self._kind.fields]
        return any(isinstance(one, str) and one.strip() == "chosen" for one in shown)

    @property
    def _kind(self) -> Kind:
        if self.kind not in KINDS:
            raise BadArgument(f"no such kind: {self.kind}")
        return KINDS[self.kind]

    def wishes(self) -> dict[str, Any]:
        """Arguments of the verb; raises BadArgument or BadSelector for what cannot be read."""
        fields = self._kind.fields
        found = self._of_kind()
        if "tokens" in fields:
            found["tokens"] = self._tokens(self.tokens, "tokens")
        for name, chosen in (("heads", self.chosen_head), ("channels", None)):
            if name in fields and getattr(self, name).strip():
                found[name] = selection(getattr(self, name), name, chosen=chosen)
        if self.sticky and not self._kind.once:
            found["sticky"] = True
        return found

    def _tokens(self, text: str, what: str) -> Any:
        if not text.strip():
            raise BadArgument(f"{what}: write a position, a slice (3:7), a list, or a token's text")
        return selection(text, what, words=PHASES, chosen=self.chosen_token)

    def _position(self, text: str, what: str) -> int:
        found = self._tokens(text, what)
        if type(found) is not int:
            raise BadArgument(f"{what}: a swap takes one position here, such as 3 or -1")
        return found

    def _of_kind(self) -> dict[str, Any]:
        if self.kind in OF_VECTORS:
            return self._with_vector()
        if self.kind in TOKEN_KINDS:
            return {self.kind: self._next_token()}
        if self.kind in ABLATIONS:
            return self._ablation()
        match self.kind:
            case "scale":
                return {"scale": self.strength}
            case "add a number":
                return {"add": self.strength}
            case "set to a number":
                return {"set": self.strength}
            case "clamp":
                bounds = (bound(self.least, "least"), bound(self.largest, "largest"))
                if bounds == (None, None):
                    raise BadArgument("clamp: give the least, the largest, or both")
                return {"clamp": bounds}
            case "zero":
                return {"zero": True}
            case "mean over tokens":
                return {"mean": True}
            case "swap two tokens":
                pair = [self._position(self.first, "first"), self._position(self.second, "second")]
                return {"swap": True, "tokens": pair}
            case "patch":
                return self._patch()
        raise BadArgument(f"no such kind: {self.kind}")

    def _with_vector(self) -> dict[str, Any]:
        if not self.vector:
            raise BadArgument("choose a named vector; the library below makes one")
        more = {"inexact": True} if self.inexact else {}
        if self.kind == "add a vector":
            return {"vector": self.vector, "alpha": self.strength, **more}
        return {"project_out": self.vector, **more}

    def _ablation(self) -> dict[str, Any]:
        name, _ = ABLATIONS[self.kind]
        if self.layer is None:
            raise BadArgument(f"no layer ahead has {name}: go back to an earlier stop")
        if not self.ablated.strip():
            raise BadArgument(f"{name}: write a number, a slice (3:7) or a list ([0, 2])")
        chosen = self.chosen_head if name == "heads" else None
        found = {"layer": self.layer, name: selection(self.ablated, name, chosen=chosen)}
        return {**found, "mean": True} if self.mean else found

    def _patch(self) -> dict[str, Any]:
        if self.source is None:
            raise BadArgument(
                "choose where the patch comes from: a session that is stopped, or a node"
            )
        found: dict[str, Any] = {"node" if isinstance(self.source, int) else "session": self.source}
        if self.rows.strip():
            found["rows"] = self._tokens(self.rows, "tokens there")
        return found

    def _next_token(self) -> Any:
        named = [next_tokens(self.token_text, several=self.kind == "ban")]
        if self.kind == "replace":
            named.append(next_tokens(self.instead, several=False))
        if len({isinstance(one, int) for one in named}) > 1:
            raise BadArgument("write both tokens as texts, or both as ids (id 42)")
        return named[0] if self.kind != "replace" else tuple(named)


def selection(text: str, what: str, words: Sequence[str] = (), chosen: int | None = None) -> Any:
    """A selector as people write it: -1, 3:7, [0, 2], a phase, or the text of a token.

    `last` is -1, `chosen` what the panels look at. words: the phases, where tokens are selected;
    there the rest is the text of a token. Raises BadArgument, BadSelector.

    >>> selection("3:7", "tokens"), selection("[0, 2]", "heads")
    (slice(3, 7, None), [0, 2])
    """
    text = text.strip("\n")
    bare = text.strip()
    if bare == "chosen":
        if chosen is None:
            panel = "tokens" if words else "attention"
            raise BadArgument(f"{what}: nothing is chosen; click one in the panel of {panel}")
        return chosen
    if bare in ("all", *words):
        return bare
    if bare == "last":
        return -1
    found = _read(bare)
    if found is None:
        if not (words and bare):
            raise BadArgument(f"{what}: write a number, a slice (3:7) or a list ([0, 2])")
        found = text  # the text of a token; a space in front belongs to it
    selector(found, name=what if not words else "tokens")
    return list(found) if isinstance(found, (tuple, set)) else found


def _read(bare: str) -> Any:
    """A slice or a literal; None for what is neither."""
    parts = bare.split(":")
    if 2 <= len(parts) <= 3:
        with contextlib.suppress(ValueError):
            return slice(*(int(part) if part.strip() else None for part in parts))
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return ast.literal_eval(bare)
    return None


def bound(text: str, what: str) -> float | None:
    """A number as typed; None when nothing is.

    >>> bound("-2.5", "least"), bound(" ", "largest")
    (-2.5, None)
    """
    if not text.strip():
        return None
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise BadArgument(f"{what}: write a number, or nothing for no bound, not {text[:40]!r}")
    return found


def next_tokens(text: str, *, several: bool) -> Any:
    """A token by its text, quoted or not, or by `id 42`; several: a list of texts or ids too.

    >>> next_tokens("' Mary'", several=False), next_tokens("id 42", several=False)
    (' Mary', 42)
    """
    bare = text.strip()
    if not bare:
        raise BadArgument("write the token's text, with its leading space: ' Mary'")
    if bare.startswith("id ") and bare[3:].strip().isdecimal() and len(bare) < 20:
        return int(bare[3:])
    if bare[0] in "'\"[":
        try:
            found = ast.literal_eval(bare)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text
        if isinstance(found, str):
            return found
        if several and isinstance(found, list) and all(type(i) in (str, int) for i in found):
            return found
    return text


# -- choices ------------------------------------------------------------------------------------


def sources_of(shown: Snapshot) -> list[tuple[str, str | int]]:
    """Where a patch can come from: (in words, the id of a session or the number of a node)."""
    found: list[tuple[str, str | int]] = [
        (f"session {one.id}: {one.location}, forward {one.forward}", one.id)
        for one in shown.sessions
        if one.status == "stopped" and one.location and one.id != shown.session_id
    ]
    found += [
        (f"node {node.number}: {node.location}, forward {node.forward}", node.number)
        for node in shown.branches
        if node.location and not node.current
    ]
    return found
