"""Sessions and stops as text, from plain data; nothing here asks the server."""

from __future__ import annotations

from collections.abc import Sequence

from djinn_nb.handles import breakpoint_line, edit_line
from djinn_nb.misses import missed_lines
from djinn_nb.plots import visible
from djinn_nb.residency import Residency
from djinn_nb.sites import shape_at
from djinn_nb.view import LensRow, StopView
from kernel_server.protocol import messages as m
from kernel_server.protocol.location import parse_location

#: Most tokens of a forward, and most ids of a prompt, written out.
MAX_SHOWN_TOKENS, MAX_SHOWN_IDS = 160, 400


def headline(stop: m.StopInfo, model: m.ModelInfo) -> str:
    """Where and why, in one line."""
    fed = stop.end_token - stop.first_token
    phase = "prefill" if stop.forward == 0 else "decode"
    return (
        f"stopped at {stop.location} ({stop.reason}), forward {stop.forward}"
        f" ({phase}, {_tokens(fed)}), {stop.layers_executed} of {model.num_layers} layers run"
    )


def inside_line(stop: m.StopInfo, model: m.ModelInfo, info: m.SessionInfo) -> str:
    """What it means to stand inside a layer; empty elsewhere."""
    place = parse_location(stop.location, model.num_layers)
    if not place.is_inner:
        return ""
    replayed = info.layers_replayed
    again = f", {_layers(replayed)} replayed so far" if replayed else ""
    return (
        f"inside layer {place.layer}, {place.site} {shape_at(model, stop.location)}: going on runs"
        f" the layer again from its input{again}; an edit here runs it by the replay path"
    )


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def stop_line(model: m.ModelInfo, info: m.SessionInfo, texts: Sequence[str]) -> str:
    """A stop from what its events told: the headline, the error if any, and the tokens."""
    assert info.stop is not None
    return _stop_lines(model, info, info.stop, texts)


def _stop_lines(
    model: m.ModelInfo, info: m.SessionInfo, stop: m.StopInfo, texts: Sequence[str]
) -> str:
    lines = [headline(stop, model) + origin(model, info)]
    if stop.error is not None:
        lines.append(f"  {stop.error.code}: {stop.error.message}")
    if inside := inside_line(stop, model, info):
        lines.append(f"  {inside}")
    lines.append(f"  {_tokens_line(info, stop, texts)}")
    return "\n".join(lines)


def residency_line(info: m.SessionInfo) -> str:
    """Where a session's pages lie."""
    return f"KV: {Residency.of(info)!r}"


def away_line(info: m.SessionInfo) -> str:
    """Where its pages lie if some have left the device or are kept there; empty otherwise."""
    found = Residency.of(info)
    return residency_line(info) if found.pinned or not found.is_resident else ""


def stop_text(view: StopView) -> str:
    """A stop in full, as text."""
    lines = [_stop_lines(view.model, view.session, view.stop, view.texts)]
    if view.stop.hit_breakpoints:
        lines.append(f"  {hits_line(view)}")
    lines.append(f"  {view.summary}")
    if view.lens:
        found = ", ".join(f"{quoted(row)} {row.probability:.3f}" for row in view.lens)
        lines.append(
            f"  lens at position {view.lens_position}: {found}"
            f" (entropy {view.lens_entropy:.2f} nats)"
        )
    elif view.lens_refusal:
        lines.append(f"  no lens: {view.lens_refusal}")
    if away := away_line(view.session):
        lines.append(f"  {away}")
    lines += [f"  {edit_line(edit)}" for edit in edits_here(view)]
    return "\n".join(lines)


def finished_line(model: m.ModelInfo, info: m.SessionInfo) -> str:
    """How a generation ended, in one line."""
    generated = len(info.tokens) - info.num_prompt_tokens
    return f"finished ({info.finish_reason}), {_tokens(generated)} generated" + origin(model, info)


def ended_ids(info: m.SessionInfo) -> str:
    """The ids generated, where tokens have no text."""
    return f"ids {_ids(info.tokens[info.num_prompt_tokens :])}"


def finished_text(
    model: m.ModelInfo, info: m.SessionInfo, texts: tuple[str, str], notes: Sequence[str] = ()
) -> str:
    """The end of a generation, as text; `texts` are the prompt and the continuation."""
    body = "".join(texts) or ended_ids(info)
    return "\n  ".join([finished_line(model, info), body, *notes, *missed_lines(info)])


def session_text(
    model: m.ModelInfo, info: m.SessionInfo, prompt: Sequence[str], *, terminated: bool = False
) -> str:
    """A session: its status, its exact prompt ids, its breakpoints and edits."""
    generated = len(info.tokens) - info.num_prompt_tokens
    name = f" ({info.name})" if info.name not in ("", info.id) else ""
    where = f" at {info.location}" if info.location and info.status != "finished" else ""
    status = "terminated" if terminated else f"{info.status}{where}"
    lines = [
        f"session {info.id}{name}: {status}, forward {info.forward},"
        f" {generated} of {info.max_new_tokens} tokens generated"
        f" · {_sampling(info)}{_random(model)}"
    ]
    ids = info.tokens[: info.num_prompt_tokens]
    lines.append(f"  prompt, {_tokens(len(ids))}: {_ids(ids)}")
    texts = list(prompt)[: len(ids)]
    if any(texts):
        shown = "|".join(visible(t) for t in texts[:MAX_SHOWN_TOKENS])
        lines.append(f"  {shown}{'…' * (len(texts) > MAX_SHOWN_TOKENS)}")
    if info.error is not None:
        lines.append(f"  {info.error.code}: {info.error.message}")
    if info.num_pages and not terminated:
        lines.append(f"  {residency_line(info)}")
    lines += [f"  {breakpoint_line(point)}" for point in info.breakpoints]
    lines += [f"  {edit_line(edit)}" for edit in info.edits]
    return "\n".join(lines)


def _sampling(info: m.SessionInfo) -> str:
    if info.temperature == 0:
        return "greedy"
    return f"temperature {info.temperature:g}, top-p {info.top_p:g}, seed {info.seed}"


def origin(model: m.ModelInfo, info: m.SessionInfo) -> str:
    return f" · session {info.id}{_random(model)}"


def _random(model: m.ModelInfo) -> str:
    return " · random weights" if model.random_weights else ""


def _tokens_line(info: m.SessionInfo, stop: m.StopInfo, texts: Sequence[str]) -> str:
    last = stop.end_token - 1
    span = f"token {last}" if last == stop.first_token else f"tokens {stop.first_token}–{last}"
    if any(texts):
        hidden = max(0, len(texts) - MAX_SHOWN_TOKENS)
        ids = info.tokens[stop.first_token + hidden : stop.end_token]
        shown = "|".join(
            visible(text) or f"id {i}" for i, text in zip(ids, texts[hidden:], strict=True)
        )
        return f"{span}: {'…|' * bool(hidden)}{shown}"
    return f"{span}: ids {_ids(info.tokens[stop.first_token : stop.end_token])}"


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _ids(ids: Sequence[int]) -> str:
    if len(ids) <= MAX_SHOWN_IDS:
        return str(list(ids))
    head = ", ".join(map(str, ids[: MAX_SHOWN_IDS // 2]))
    tail = ", ".join(map(str, ids[-MAX_SHOWN_IDS // 2 :]))
    return f"[{head}, … {len(ids) - MAX_SHOWN_IDS} more …, {tail}]"


def hits_line(view: StopView) -> str:
    points = {point.id: point for point in view.session.breakpoints}
    line = "; ".join(
        breakpoint_line(points[i]) if i in points else f"breakpoint {i}, removed since"
        for i in view.stop.hit_breakpoints
    )
    if hits := hits_of(view):
        line += " · held at position " + ", ".join(map(str, hits[:20])) + "…" * (len(hits) > 20)
    return line


def hits_of(view: StopView) -> tuple[int, ...]:
    """Positions at which a condition held; a breakpoint without one holds everywhere."""
    hit = [p for p in view.session.breakpoints if p.id in view.stop.hit_breakpoints]
    return view.stop.hit_tokens if any(p.condition for p in hit) else ()


def edits_here(view: StopView) -> list[m.EditInfo]:
    """The edits that had a part in what this forward shows."""
    return [edit for edit in view.session.edits if edit.sticky or edit.forward == view.stop.forward]


def quoted(row: LensRow) -> str:
    return repr(row.text) if row.text else f"id {row.token_id}"
