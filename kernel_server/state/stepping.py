"""Where next, step_in, step_out and run_to lead, and how far a stretch may go.

A target is a (forward, point); a session that has one stops there unless a breakpoint or the end
comes first. Pure functions of where the session stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from kernel_server.protocol.location import EMBEDDING, Point, inner_point, layer_of
from kernel_server.protocol.messages import Reason
from kernel_server.state.breakpoints import Place
from kernel_server.state.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Target:
    """A place to stop at once, and the reason the stop will have."""

    forward: int
    point: Point
    reason: Reason = "step"


def entry() -> Target:
    """The first place of the first forward."""
    return Target(0, EMBEDDING, "entry")


def next_target(shape: ModelShape, forward: int, point: Point) -> Target:
    """The next layer's output, from inside a layer that layer's; after the last layer the final
    norm, the logits, then the next forward's first layer."""
    if point == shape.logits:
        return Target(forward + 1, 1)
    return Target(forward, math.floor(max(point, EMBEDDING)) + 1)


def step_in_target(shape: ModelShape, forward: int, point: Point) -> Target:
    """The next site: inside the layer, at its end, or where a layer has no sites, as `next`. A
    forward's first site is its embedding."""
    if point == shape.logits:
        return Target(forward + 1, EMBEDDING)
    if point < EMBEDDING:
        return Target(forward, EMBEDDING)
    layer = layer_of(point)
    if layer < shape.num_layers:
        for layout in shape.inner_sites(layer):
            if (found := inner_point(layer, layout.site)) > point:
                return Target(forward, found)
    return Target(forward, layer + 1)


def step_out_target(shape: ModelShape, forward: int, point: Point) -> Target:
    """This forward's logits, before sampling; from there, the next forward's."""
    return run_to_target(forward, point, shape.logits)


def run_to_target(forward: int, point: Point, wanted: Point) -> Target:
    """`wanted` when it is reached next, in this forward or the one after."""
    return Target(forward if wanted > point else forward + 1, wanted)


def furthest(
    shape: ModelShape,
    forward: int,
    point: Point,
    target: Target | None,
    pausing: bool,
    armed: Iterable[Place],
) -> Point:
    """How far the session's current forward may run without asking: the nearest sure stop.

    armed: in the order of their points.
    """
    until: Point = shape.sampled
    if pausing and point < EMBEDDING:
        until = EMBEDDING
    if target is not None and target.forward == forward and point < target.point < until:
        until = target.point
    for place, found in armed:
        if place >= until:
            break
        if place > point and found.sure:
            return place
    return until
