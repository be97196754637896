"""Places in a forward: how they are named, parsed, printed and ordered.

A location is a site of a layer, or one of `embedding`, `final_norm`, `logits`. `layers.N.input` is
the same tensor as the output of the layer before, so it is read as that one. Names of Hugging Face
and TransformerLens are accepted. Points are locations as numbers, in the order they are reached;
the sites inside layer i lie between whole ones, at exact sixteenths::

    0 embedding   i + 1 layers.i.output   L + 1 final_norm   L + 2 logits
    i + 1/16 layers.i.attention.q   …   i + 9/16 layers.i.mlp.output

Which of them a model has is its own matter: here every name is known.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from kernel_server.protocol.errors import NotSupported, UnknownLocation

#: Sites inside a layer, in the order of their points.
INNER_SITES = (
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.pattern",
    "attention.heads",
    "attention.output",
    "middle",
    "mlp.neurons",
    "mlp.output",
)
#: Inner sites whose tensor is as wide as the residual stream and can be read by the logit lens.
RESIDUAL_SITES = ("attention.output", "middle", "mlp.output")
LAYER_SITES = ("input", *INNER_SITES, "output")
OUTER_SITES = ("embedding", "final_norm", "logits")

#: A place in the order of one forward; whole but inside a layer.
Point = float

NOT_STARTED = -1
EMBEDDING = 0

#: distance of the points inside a layer: a power of two, so that points are exact
_STEP = 1 / 16

#: longer texts are nobody's name for a place, and a number of 5,000 digits is slow to read
_MAX_LENGTH = 80

_LAYER = re.compile(r"^(?:layers|blocks|h)\.(-?\d+)(?:\.(.+))?$")
_HF_HIDDEN = re.compile(r"^hidden_states\[(-?\d+)\]$")
_LENS_SITES = {
    "hook_resid_pre": "input",
    "hook_resid_post": "output",
    "hook_resid_mid": "middle",
    "hook_attn_out": "attention.output",
    "hook_mlp_out": "mlp.output",
    "attn.hook_rot_q": "attention.q",
    "attn.hook_rot_k": "attention.k",
    "attn.hook_v": "attention.v",
    "attn.hook_pattern": "attention.pattern",
    "attn.hook_z": "attention.heads",
    "mlp.hook_post": "mlp.neurons",
}
#: names of others for tensors that we do not show: what to use instead
_NOT_OURS = {
    "attn.hook_q": "queries before rotary embedding; ours are after it: 'attention.q'",
    "attn.hook_k": "keys before rotary embedding; ours are after it: 'attention.k'",
    "attn.hook_attn_scores": "scores before the softmax; the weights are 'attention.pattern'",
    "attn.hook_result": "each head's part of the output; the heads are 'attention.heads',"
    " their parts stop.attribution()",
    "mlp.hook_pre": "neurons before their activation; after it they are 'mlp.neurons'",
}
_OUTER_NAMES = {
    "embedding": "embedding",
    "final_norm": "final_norm",
    "logits": "logits",
    "ln_final.hook_normalized": "final_norm",
    "unembed.hook_out": "logits",
}


@dataclass(frozen=True, slots=True)
class Location:
    """A place where a forward can stop. `str(location)` is its name, `layers.20.output`."""

    layer: int | None
    site: str

    def __str__(self) -> str:
        return self.site if self.layer is None else f"layers.{self.layer}.{self.site}"

    @property
    def is_inner(self) -> bool:
        """Whether it lies inside a layer."""
        return self.site in INNER_SITES

    def point(self, num_layers: int) -> Point:
        """Its place in the order of one forward."""
        if self.layer is not None:
            if self.site == "input":
                return self.layer
            return inner_point(self.layer, self.site) if self.is_inner else self.layer + 1
        return {"embedding": 0, "final_norm": num_layers + 1, "logits": num_layers + 2}[self.site]


def inner_point(layer: int, site: str) -> Point:
    """The point of a site inside a layer.

    >>> inner_point(12, "mlp.output") - 12 == 9 / 16
    True
    """
    return layer + (1 + INNER_SITES.index(site)) * _STEP


def is_inner(point: Point) -> bool:
    """Whether a point lies inside a layer, where a part of the layer has run."""
    return point != math.floor(point)


def layer_of(point: Point) -> int:
    """The layer that a point inside a layer belongs to, or that follows a whole one."""
    return math.floor(point)


def site_of(point: Point) -> str:
    """The site of a point inside a layer."""
    return INNER_SITES[round((point - math.floor(point)) / _STEP) - 1]


def location_at(point: Point, num_layers: int) -> Location:
    """The location of a point between 0 and `num_layers` + 2."""
    if is_inner(point) and 0 < point < num_layers:
        return Location(layer_of(point), site_of(point))
    point = int(point)
    if point == EMBEDDING:
        return Location(None, "embedding")
    if 0 < point <= num_layers:
        return Location(point - 1, "output")
    if point in (num_layers + 1, num_layers + 2):
        return Location(None, "final_norm" if point == num_layers + 1 else "logits")
    raise ValueError(f"point {point} lies outside a forward of {num_layers} layers")


def final_norm_point(num_layers: int) -> int:
    return num_layers + 1


def logits_point(num_layers: int) -> int:
    return num_layers + 2


def sampled_point(num_layers: int) -> int:
    """One past the last stop of a forward: the next token has been drawn."""
    return num_layers + 3


def layers_executed(point: Point, num_layers: int) -> int:
    """Distinct layers finished in this forward when it stands at `point`."""
    return min(max(math.floor(point), 0), num_layers)


def layers_begun(point: Point, num_layers: int) -> int:
    """Layers finished, and the one whose inside a forward at `point` has entered."""
    return min(max(math.ceil(point), 0), num_layers)


def parse_location(spec: object, num_layers: int) -> Location:
    """Read a location from a layer number or a name, or raise `UnknownLocation`.

    >>> str(parse_location(20, 24)), str(parse_location("hidden_states[21]", 24))
    ('layers.20.output', 'layers.20.output')
    """
    if isinstance(spec, Location):
        spec = str(spec)
    if isinstance(spec, bool) or not isinstance(spec, (int, str)):
        raise UnknownLocation(
            f"a location is a layer number or a name such as 'layers.20.output', not {spec!r}"
        )
    text = str(spec).strip() if isinstance(spec, str) or abs(spec) < 10**9 else "that number"
    if len(text) > _MAX_LENGTH:
        raise _unknown(f"{text[:_MAX_LENGTH]}…", num_layers)
    if re.fullmatch(r"-?\d+", text):
        return _layer_site(int(text), "output", num_layers, text)
    if found := _HF_HIDDEN.match(text):
        return _hf_hidden(int(found[1]), num_layers, text)
    bare = re.sub(r"^(?:model|transformer|gpt_neox)\.(?:decoder\.)?", "", text)
    if bare in _OUTER_NAMES:
        return Location(None, _OUTER_NAMES[bare])
    if found := _LAYER.match(bare):
        site = found[2] or "output"
        return _layer_site(int(found[1]), _LENS_SITES.get(site, site), num_layers, text)
    raise _unknown(text, num_layers)


def _hf_hidden(index: int, num_layers: int, text: str) -> Location:
    """`hidden_states` holds the embedding, the layers' outputs and, last, the normed one."""
    if not -num_layers - 1 <= index <= num_layers:
        raise UnknownLocation(
            f"{text}: the model has {num_layers} layers, so hidden_states has indexes 0 to"
            f" {num_layers}",
            num_layers=num_layers,
        )
    index %= num_layers + 1
    if index == num_layers:
        return Location(None, "final_norm")
    return location_at(index, num_layers)


def _layer_site(layer: int, site: str, num_layers: int, text: str) -> Location:
    if not -num_layers <= layer < num_layers:
        raise UnknownLocation(
            f"{text}: the model has {num_layers} layers, numbered 0 to {num_layers - 1}",
            num_layers=num_layers,
        )
    layer %= num_layers
    if site in _NOT_OURS:
        raise NotSupported(f"{text} are {_NOT_OURS[site]}", site=site)
    if site not in LAYER_SITES:
        raise _unknown(text, num_layers)
    if site == "input":
        return location_at(layer, num_layers)
    return Location(layer, site)


def known_names(num_layers: int, inner_sites: Iterable[str] = INNER_SITES) -> list[str]:
    """Every name a stop can have, in order, for completion and messages."""
    sites = ("input", *(site for site in INNER_SITES if site in set(inner_sites)), "output")
    names = [f"layers.{layer}.{site}" for layer in range(num_layers) for site in sites]
    return ["embedding", *names, "final_norm", "logits"]


def _unknown(text: str, num_layers: int) -> UnknownLocation:
    near = difflib.get_close_matches(text, known_names(num_layers), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UnknownLocation(
        f"unknown location {text!r}{hint} (use a layer number 0 to {num_layers - 1},"
        " 'layers.N.output' or another site of it such as 'layers.N.middle', 'embedding',"
        " 'final_norm' or 'logits')",
        num_layers=num_layers,
    )
