"""Which conditions are accepted at which places: the lens and named vectors need tensors that fit.

What the names mean is decided in `protocol.conditions`, what they are worth in the engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from kernel_server.protocol.conditions import LENS_NAMES, Condition, parse_condition
from kernel_server.protocol.errors import BadCondition, UnknownVector
from kernel_server.protocol.location import RESIDUAL_SITES, Point, is_inner, location_at, site_of
from kernel_server.protocol.messages import SetBreakpoint
from kernel_server.state.instructions import Lookup
from kernel_server.state.shape import ModelShape


def make_condition(
    request: SetBreakpoint, points: Sequence[Point], shape: ModelShape
) -> tuple[Condition | None, Lookup | None]:
    """The condition asked for, with what its texts stand for, or a refusal.

    Raises `BadCondition` where it does not parse, the lens cannot be read or a vector has another
    width, and `UnknownVector`.
    """
    if request.condition is None:
        return None, None
    condition = parse_condition(request.condition)
    if condition.names & LENS_NAMES:
        _require_residual(condition, points, shape)
    if not condition.prob_texts and not condition.vectors:
        return condition, None
    ids = {entry.text: entry.token_ids for entry in request.text_ids}
    if missing := [text for text in condition.prob_texts if not ids.get(text)]:
        raise BadCondition(f"no token of this model has the text {missing[0]!r}")
    vectors = {entry.name: entry.value for entry in request.vectors}
    if unknown := [name for name in condition.vectors if name not in vectors]:
        raise UnknownVector(f"you have no vector named {unknown[0]!r}")
    for name in condition.vectors:
        _require_width(name, vectors[name].shape, points, shape)
    return condition, Lookup(token_ids=ids, vectors=vectors)


def _require_residual(condition: Condition, points: Sequence[Point], shape: ModelShape) -> None:
    names = ", ".join(sorted(condition.names & LENS_NAMES))
    for point in points:
        if is_inner(point) and site_of(point) not in RESIDUAL_SITES:
            raise BadCondition(
                f"{location_at(point, shape.num_layers)} is not as wide as the residual stream, so"
                f" the logit lens ({names}) cannot be read there: use the output of a layer, its"
                f" {', '.join(RESIDUAL_SITES)}, final_norm or logits",
                condition=condition.text,
            )


def _require_width(
    name: str, given: tuple[int, ...], points: Sequence[Point], shape: ModelShape
) -> None:
    for point in points:
        heads, width = shape.layout(point, 0)
        width *= heads or 1
        if given == (width,):
            continue
        place = location_at(point, shape.num_layers)
        is_wide = f"is {width} wide" if width else "has as many channels as there are keys"
        raise BadCondition(
            f"the vector {name!r} has shape {list(given)}, and {place} {is_wide}: choose places"
            " where the vector fits",
            vector=name,
        )
