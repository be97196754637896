"""An edit in one line, as lists, panels and records show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernel_server.protocol.location import location_at
from kernel_server.protocol.messages import EditSpec
from kernel_server.state.selectors import describe

if TYPE_CHECKING:
    from kernel_server.state.edits import Edit

#: Token ids that a line shows.
_SHOWN = 8


def description(edit: Edit, num_layers: int) -> str:
    """What an edit does, where, and to which tokens and elements.

    description(edit, 24)    # "add 4 × vector 'joy' at layers.16.output, tokens all, sticky"
    """
    spec = edit.spec
    place = str(location_at(edit.point, num_layers))
    text = f"{_what(spec)} at {place}, tokens {edit.selector}"
    if spec.source is not None and spec.source.location not in ("", place):
        text += f", from {spec.source.location}"
    if spec.heads.kind != "all":
        text += f", heads {describe(spec.heads)}"
    if spec.channels.kind != "all":
        text += f", channels {describe(spec.channels)}"
    return text + (", sticky" if spec.sticky else "")


def _what(spec: EditSpec) -> str:
    match spec.kind:
        case "scale":
            return f"scale {spec.factor:g}"
        case "add":
            return (f"add {spec.alpha:g} × " if spec.alpha != 1.0 else "add ") + _value(spec)
        case "set" if spec.source is not None:
            return f"patch {_value(spec)}"
        case "set" | "project_out":
            return f"{spec.kind} {_value(spec)}"
        case "clamp":
            least = "" if spec.minimum is None else f"{spec.minimum:g}"
            most = "" if spec.maximum is None else f"{spec.maximum:g}"
            return f"clamp {least}…{most}"
        case "force" | "ban":
            return f"{spec.kind} {_tokens(spec, spec.token_ids)}"
        case "replace":
            first, second = _names(spec, spec.token_ids)
            return f"replace {first} by {second}"
    return spec.kind


def _value(spec: EditSpec) -> str:
    value = spec.value
    if value is None:
        return "value"
    if spec.vector is not None:
        return f"vector {spec.vector!r}"
    shape = f"{list(value.shape)}"
    if spec.source is not None:
        return f"{shape} of session {spec.source.session_id}, stop {spec.source.seen}"
    return f"{float(value.numpy()):g}" if not value.shape else f"value {shape}"


def _tokens(spec: EditSpec, ids: tuple[int, ...]) -> str:
    more = len(ids) - _SHOWN
    shown = ", ".join(_names(spec, ids[:_SHOWN])) + (f", … {more} more" if more > 0 else "")
    return f"{'token' if len(ids) == 1 else 'tokens'} {shown}"


def _names(spec: EditSpec, ids: tuple[int, ...]) -> list[str]:
    """Texts where each token was named by one, else ids."""
    if len(spec.token_texts) == len(spec.token_ids):
        return [repr(text) for text in spec.token_texts[: len(ids)]]
    return [str(token_id) for token_id in ids]
