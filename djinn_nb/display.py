"""How sessions and stops show themselves: a view (plain data) first, then text or HTML from it.

`stop_view` is the only function here that asks the server; all others are pure.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from djinn_nb.handles import breakpoint_line, edit_line
from djinn_nb.plots import norm_heat_map, png, visible
from djinn_nb.progress import in_notebook
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import DjinnError

if TYPE_CHECKING:
    from djinn_nb.stopped import Stopped

#: Most tokens of a forward, and most ids of a prompt, written out.
MAX_SHOWN_TOKENS, MAX_SHOWN_IDS = 160, 400
LENS_ROWS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LensRow:
    """One candidate for the next token."""

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StopView:
    """All that a display of a stop shows."""

    model: m.ModelInfo
    session: m.SessionInfo
    stop: m.StopInfo
    #: texts of the tokens of this forward
    texts: tuple[str, ...]
    #: the tensor's figures in one line
    summary: str
    #: float32 [locations, tokens]
    norm: npt.NDArray[np.float32]
    norm_locations: tuple[str, ...]
    norm_first_token: int
    lens: tuple[LensRow, ...]
    lens_position: int
    #: nats
    lens_entropy: float
    #: why there is no lens here; empty when there is
    lens_refusal: str = ""


def stop_view(stopped: Stopped) -> StopView:
    """Fetch what the display of a stop needs: four small answers."""
    client = stopped.session.client
    info = stopped.session.refresh()
    summary = stopped.value.summary()
    capture = stopped._capture()
    lens: tuple[LensRow, ...] = ()
    position, entropy, refusal = 0, 0.0, ""
    try:
        reply = stopped._lens(LENS_ROWS, -1, None)
    except DjinnError as error:
        refusal = str(error)
    else:
        ids, probabilities = reply.token_ids.numpy()[0], reply.probabilities.numpy()[0]
        lens = tuple(
            LensRow(token_id=int(i), text=text, probability=float(p))
            for i, text, p in zip(ids, reply.texts[0], probabilities, strict=True)
        )
        position, entropy = reply.positions[0], float(reply.entropy.numpy()[0])
    assert stopped._info.stop is not None
    return StopView(
        model=client.model,
        session=info,
        stop=stopped._info.stop,
        texts=tuple(stopped._texts),
        summary=repr(summary),
        norm=capture.norm.numpy(),
        norm_locations=capture.locations,
        norm_first_token=capture.first_token,
        lens=lens,
        lens_position=position,
        lens_entropy=entropy,
        lens_refusal=refusal,
    )


def show_stop(stopped: Stopped) -> None:
    """Display a stop: as a panel in a notebook, as text elsewhere."""
    view = stopped.view()
    if in_notebook():
        from IPython.display import display

        display(stopped)  # type: ignore[no-untyped-call]
    else:
        print(stop_text(view))


# -- text ---------------------------------------------------------------------------------------


def headline(stop: m.StopInfo, model: m.ModelInfo) -> str:
    """Where and why, in one line."""
    fed = stop.end_token - stop.first_token
    phase = "prefill" if stop.forward == 0 else "decode"
    return (
        f"stopped at {stop.location} ({stop.reason}), forward {stop.forward}"
        f" ({phase}, {_tokens(fed)}), {stop.layers_executed} of {model.num_layers} layers run"
    )


def stop_line(model: m.ModelInfo, info: m.SessionInfo, texts: Sequence[str]) -> str:
    """A stop from what its events told: the headline, the error if any, and the tokens."""
    assert info.stop is not None
    return _stop_lines(model, info, info.stop, texts)


def _stop_lines(
    model: m.ModelInfo, info: m.SessionInfo, stop: m.StopInfo, texts: Sequence[str]
) -> str:
    lines = [headline(stop, model) + _origin(model, info)]
    if stop.error is not None:
        lines.append(f"  {stop.error.code}: {stop.error.message}")
    lines.append(f"  {_tokens_line(info, stop, texts)}")
    return "\n".join(lines)


def stop_text(view: StopView) -> str:
    """A stop in full, as text."""
    lines = [_stop_lines(view.model, view.session, view.stop, view.texts)]
    if view.stop.hit_breakpoints:
        lines.append(f"  {_hits_line(view)}")
    lines.append(f"  {view.summary}")
    if view.lens:
        found = ", ".join(f"{_quoted(row)} {row.probability:.3f}" for row in view.lens)
        lines.append(
            f"  lens at position {view.lens_position}: {found}"
            f" (entropy {view.lens_entropy:.2f} nats)"
        )
    elif view.lens_refusal:
        lines.append(f"  no lens: {view.lens_refusal}")
    lines += [f"  {edit_line(edit)}" for edit in _edits_here(view)]
    return "\n".join(lines)


def finished_text(model: m.ModelInfo, info: m.SessionInfo, texts: tuple[str, str]) -> str:
    """The end of a generation, as text; `texts` are the prompt and the continuation."""
    generated = len(info.tokens) - info.num_prompt_tokens
    head = f"finished ({info.finish_reason}), {_tokens(generated)} generated" + _origin(model, info)
    if any(texts):
        return f"{head}\n  {''.join(texts)}"
    return f"{head}\n  ids {_ids(info.tokens[info.num_prompt_tokens :])}"


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
    lines += [f"  {breakpoint_line(point)}" for point in info.breakpoints]
    lines += [f"  {edit_line(edit)}" for edit in info.edits]
    return "\n".join(lines)


def _sampling(info: m.SessionInfo) -> str:
    if info.temperature == 0:
        return "greedy"
    return f"temperature {info.temperature:g}, top-p {info.top_p:g}, seed {info.seed}"


def _origin(model: m.ModelInfo, info: m.SessionInfo) -> str:
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


def _hits_line(view: StopView) -> str:
    points = {point.id: point for point in view.session.breakpoints}
    line = "; ".join(
        breakpoint_line(points[i]) if i in points else f"breakpoint {i}, removed since"
        for i in view.stop.hit_breakpoints
    )
    if hits := _hits(view):
        line += " · held at position " + ", ".join(map(str, hits[:20])) + "…" * (len(hits) > 20)
    return line


def _hits(view: StopView) -> tuple[int, ...]:
    """Positions at which a condition held; a breakpoint without one holds everywhere."""
    hit = [p for p in view.session.breakpoints if p.id in view.stop.hit_breakpoints]
    return view.stop.hit_tokens if any(p.condition for p in hit) else ()


def _edits_here(view: StopView) -> list[m.EditInfo]:
    """The edits that had a part in what this forward shows."""
    return [edit for edit in view.session.edits if edit.sticky or edit.forward == view.stop.forward]


def _quoted(row: LensRow) -> str:
    return repr(row.text) if row.text else f"id {row.token_id}"


# -- HTML ---------------------------------------------------------------------------------------

# Colours are given with the page's own text colour and translucent fills, so both themes read.
_CARD = (
    "border:1px solid rgba(128,128,128,.45);border-radius:4px;padding:8px 12px;margin:2px 0;"
    "font-size:13px;line-height:1.5;color:inherit;background:transparent"
)
_MONO = "font-family:var(--jp-code-font-family,monospace);font-size:12px"
_TOKEN = (
    "display:inline-block;white-space:pre;border:1px solid rgba(128,128,128,.35);"
    "border-radius:3px;padding:0 2px;margin:1px"
)
_HIT = "background:rgba(255,165,0,.35);text-decoration:underline"
_CURSOR = "outline:2px solid rgb(31,119,180)"
_MUTED = "opacity:.75"


def stop_html(view: StopView) -> str:
    """A stop as a panel: tokens, where it stands, norms, lens; every colour has a legend."""
    parts = [
        f"<div><b>{escape(headline(view.stop, view.model))}</b>"
        f"<span style='{_MUTED}'>{escape(_origin(view.model, view.session))}"
        f" · {escape(view.model.name)}</span></div>",
    ]
    if view.stop.error is not None:
        error = f"{view.stop.error.code}: {view.stop.error.message}"
        parts.append(f"<div role='alert'>⚠ {escape(error)}</div>")
    if view.stop.hit_breakpoints:
        parts.append(f"<div style='{_MUTED}'>{escape(_hits_line(view))}</div>")
    parts += [
        _ladder(view.stop, view.model.num_layers),
        _token_strip(view),
        f"<div style='{_MONO}'>{escape(view.summary)}</div>",
        _heat_map(view),
        _lens_table(view),
    ]
    if here := _edits_here(view):
        edits = "".join(f"<li>{escape(edit_line(edit))}</li>" for edit in here)
        parts.append(f"<div>edits<ul style='margin:0'>{edits}</ul></div>")
    label = escape(f"Djinn: {headline(view.stop, view.model)}", quote=True)
    return f"<div role='region' aria-label='{label}' style='{_CARD}'>{''.join(parts)}</div>"


def finished_html(model: m.ModelInfo, info: m.SessionInfo, texts: tuple[str, str]) -> str:
    """The end of a generation: prompt plain, continuation in bold."""
    head, _, body = finished_text(model, info, texts).partition("\n")
    if any(texts):
        prompt, made = texts
        shown = f"<span style='{_MUTED}'>{escape(prompt)}</span><b>{escape(made)}</b>"
    else:
        shown = escape(body.strip())
    return (
        f"<div style='{_CARD}'><div><b>{escape(head)}</b></div>"
        f"<div style='{_MONO};white-space:pre-wrap'>{shown}</div></div>"
    )


def text_html(text: str) -> str:
    """Plain text in a card."""
    return f"<div style='{_CARD}'><pre style='margin:0;color:inherit'>{escape(text)}</pre></div>"


def _ladder(stop: m.StopInfo, num_layers: int) -> str:
    """One cell per layer: filled ones have run in this forward; the cursor stands behind them."""
    done = stop.layers_executed
    cells = []
    for layer in range(num_layers):
        fill = "rgba(31,119,180,.75)" if layer < done else "transparent"
        cells.append(
            f"<span title='layer {layer}' style='display:inline-block;width:8px;height:12px;"
            f"margin-right:1px;border:1px solid rgba(128,128,128,.6);background:{fill}'></span>"
        )
    cursor = "<span style='font-weight:bold'>▲</span>"
    cells.insert(done, cursor)
    return (
        f"<div aria-label='{done} of {num_layers} layers run' style='margin:4px 0'>"
        f"layers {''.join(cells)} <span style='{_MUTED}'>filled: run in this forward ·"
        f" ▲ {escape(stop.location)}</span></div>"
    )


def _token_strip(view: StopView) -> str:
    first, total = view.stop.first_token, len(view.texts)
    hidden = max(0, total - MAX_SHOWN_TOKENS)
    ids = view.session.tokens[first : view.stop.end_token]
    hits = set(_hits(view))
    spans = []
    for i in range(hidden, total):
        style = _TOKEN
        if first + i in hits:
            style += f";{_HIT}"
        if i == total - 1:
            style += f";{_CURSOR}"
        text = visible(view.texts[i]) if view.texts[i] else str(ids[i])
        title = f"position {first + i}, id {ids[i]}"
        spans.append(f"<span style='{style}' title='{title}'>{escape(text)}</span>")
    legend = "outlined: the last token fed"
    if hits:
        legend = (
            f"<span style='{_HIT}'>shaded, underlined</span>: a breakpoint held there · {legend}"
        )
    more = f"<span style='{_MUTED}'>… {hidden} earlier tokens </span>" if hidden else ""
    return (
        f"<div style='{_MONO}'>{more}{''.join(spans)}</div>"
        f"<div style='{_MUTED};font-size:11px'>{legend}</div>"
    )


def _heat_map(view: StopView) -> str:
    if not view.norm.size:
        return ""
    positions = range(view.norm_first_token, view.norm_first_token + view.norm.shape[1])
    texts = view.texts if len(view.texts) == view.norm.shape[1] else None
    figure = norm_heat_map(
        view.norm, view.norm_locations, positions, texts,
        title=f"norm of each token's vector, forward {view.stop.forward}",
    )  # fmt: skip
    data = base64.b64encode(png(figure)).decode()
    description = escape(
        f"Heat map of L2 norms: {view.norm.shape[0]} locations by {view.norm.shape[1]} tokens",
        quote=True,
    )
    return (
        f"<div><img alt='{description}' style='max-width:100%;background:white'"
        f" src='data:image/png;base64,{data}'></div>"
    )


def _lens_table(view: StopView) -> str:
    if not view.lens:
        refusal = f"no lens: {view.lens_refusal}" if view.lens_refusal else ""
        return f"<div style='{_MUTED}'>{escape(refusal)}</div>" if refusal else ""
    rows = "".join(
        f"<tr><td style='text-align:left;{_MONO};white-space:pre'>{escape(_quoted(row))}</td>"
        f"<td style='text-align:right'>{row.token_id}</td>"
        f"<td style='text-align:right'>{row.probability:.3f}</td>"
        f"<td style='text-align:left'><span style='display:inline-block;height:9px;"
        f"width:{max(1, round(120 * row.probability))}px;background:rgba(31,119,180,.75)'>"
        "</span></td></tr>"
        for row in view.lens
    )
    kind = "next token" if view.stop.location == "logits" else "logit lens"
    return (
        f"<table style='margin:4px 0'><caption style='text-align:left;caption-side:top'>{kind} at"
        f" position {view.lens_position}, entropy {view.lens_entropy:.2f} nats</caption>"
        "<thead><tr><th style='text-align:left'>token</th><th>id</th><th>probability</th>"
        f"<th style='text-align:left'>0 to 1</th></tr></thead><tbody>{rows}</tbody></table>"
    )
