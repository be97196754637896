"""How many bytes the tensors of a session come to beside its pages: upper bounds, by formula.

What the engine really holds is less, since the stops of one forward share tensors. A tensor counts
as the whole units that a GPU's allocator gives it. What follows from the numbers is decided in
`holding`.
"""

from __future__ import annotations

import math

from kernel_server.protocol.location import (
    Point,
    final_norm_point,
    is_inner,
    layer_of,
    site_of,
)
from kernel_server.state.sessions import Session
from kernel_server.state.shape import ModelShape

#: Up to this many tokens a forward's residual stream is kept at every layer (the engine's
#: `KEEP_ROWS`); of a longer one only figures.
KEPT_ROWS = 16
#: A GPU's allocator gives no less, and multiples of it.
UNIT = 512

#: What else a recording holds, and what its small tensors take beyond their bytes.
_FEW = 8192

#: Sites that may be parts of one tensor.
_TOGETHER = ("attention.q", "attention.k", "attention.v")


def rounded(nbytes: int) -> int:
    """What a tensor of so many bytes takes.

    >>> rounded(513)
    1024
    """
    return -(-nbytes // UNIT) * UNIT


def rows(shape: ModelShape, tokens: int, width: int) -> int:
    """Bytes of `[tokens, width]`, in chunks as a prefill cuts them."""
    size = min(tokens, shape.prefill_chunk)
    whole, left = divmod(tokens, size)
    row = width * shape.element_bytes
    return whole * rounded(size * row) + rounded(left * row)


def figures(points: int, tokens: int) -> int:
    """Bytes of norm, largest and number of NaN at so many points of one forward."""
    return 2 * rounded(4 * points * tokens) + rounded(8 * points)


def history_bytes(shape: ModelShape, num_prompt: int, forwards: int) -> int:
    """Bytes of the figures of so many finished forwards, the first of which fed the prompt."""
    points = shape.num_layers + 1
    if not forwards:
        return 0
    return figures(points, num_prompt) + (forwards - 1) * figures(points, 1)


def session_bytes(shape: ModelShape, num_prompt: int, max_new_tokens: int) -> int:
    """Bytes of what a session of so many tokens may come to hold, if it stops at outputs of layers
    and is not edited."""
    history = history_bytes(shape, num_prompt, max_new_tokens)
    return history + forward_bytes(shape, num_prompt)


def captured_bytes(shape: ModelShape, tokens: int, point: Point) -> int:
    """Bytes of what is captured of a forward up to a point."""
    points = min(math.floor(point), shape.num_layers) + 1
    if tokens <= KEPT_ROWS:
        return points * rows(shape, tokens, shape.hidden_size)
    return points * (figures(1, tokens) + rows(shape, 1, shape.hidden_size))


def value_bytes(shape: ModelShape, point: Point, first: int, end: int) -> int:
    """Bytes of the tensor at a point of the forward that feeds the tokens `first` to `end`."""
    if point == shape.logits:
        return rounded(4 * shape.vocab_size)
    if is_inner(point) and site_of(point) in _TOGETHER:
        layouts = (s for s in shape.inner_sites(layer_of(point)) if s.site in _TOGETHER)
        width = sum((layout.heads or 1) * layout.width for layout in layouts)
    else:
        heads, width = shape.layout(point, end)
        width *= heads or 1
    return rows(shape, end - first, width)


def stop_bytes(shape: ModelShape, session: Session) -> int:
    """Bytes of what a session holds where it stands, but for the figures of finished forwards and
    what is recorded of the forward's calls."""
    logits = rounded(4 * shape.vocab_size) if session.finished_forwards else 0
    if session.status != "stopped":
        return logits
    first, end, point = session.first_token, session.end_token, session.point
    tokens, hidden = end - first, shape.hidden_size
    size = logits + rows(shape, tokens, hidden) + captured_bytes(shape, tokens, point)
    made = {edit.point for edit, where in session.applied.get(session.forward, ()) if where}
    if is_inner(point):
        layer = layer_of(point)
        inside = {p for p in made if is_inner(p) and layer_of(p) == layer and p < point}
        size += sum(value_bytes(shape, p, first, end) for p in inside)
        size += value_bytes(shape, point, first, end)
    elif point >= final_norm_point(shape.num_layers):
        size += rows(shape, tokens, shape.norm_size)
        size += value_bytes(shape, shape.logits, first, end) if point == shape.logits else 0
    if point in made:
        size += value_bytes(shape, point, first, end)  # as it was before
    compared = len(session.breakpoints.reads(session.forward, point))
    return size + compared * rows(shape, tokens, hidden)


def forward_bytes(shape: ModelShape, tokens: int) -> int:
    """Bytes of what a session comes to hold in a forward of so many tokens, if it stops at the
    output of a layer and is not edited.

    What passes while it runs, its final norm among that, is part of the workspace.
    """
    size = rows(shape, tokens, shape.hidden_size) + 2 * rounded(4 * shape.vocab_size)
    return size + captured_bytes(shape, tokens, shape.num_layers) + recorded_bytes(shape, tokens)


def recorded_bytes(shape: ModelShape, tokens: int) -> int:
    """Bytes of the recorded calls of a forward; the embedding is kept with a single token's."""
    per_token = shape.recorded_token_bytes
    if tokens == 1:
        per_token += shape.embedded_token_bytes
    return _FEW + tokens * per_token + min(int(tokens**2 * shape.pair_bytes), shape.kept_mask_bytes)


def standing_bytes(shape: ModelShape, session: Session) -> int:
    """Bytes of all that a session holds or comes to hold before it ends, unless it goes back."""
    if session.dormant or session.status == "failed":
        return 0
    size = history_bytes(shape, len(session.prompt), _forwards(session))
    if session.branch:
        return size
    held = stop_bytes(shape, session)
    if session.status == "finished":
        return size + held
    tokens = session.end_token - session.first_token
    held += recorded_bytes(shape, tokens) if session.status == "stopped" else 0
    return size + max(held, forward_bytes(shape, tokens)) + caught_bytes(shape, session)


def _forwards(session: Session) -> int:
    """How many forwards it will have finished."""
    ended = session.branch or session.scratch or session.status == "finished"
    return session.finished_forwards if ended else session.max_new_tokens


def caught_bytes(shape: ModelShape, session: Session) -> int:
    """Bytes of what a scratch fork catches on its way."""
    captures = session.captures
    if captures is None or captures.what not in ("tensor", "stream"):
        return 0
    first, end = session.first_token, session.end_token
    if captures.what == "stream":
        # as wide as the residual stream, at every point of every forward to come
        count = len(session.prompt) + session.max_new_tokens - first
        count = count if captures.rows is None else len(captures.rows)
        return len(captures.points) * rows(shape, count, shape.hidden_size)
    count = end - first if captures.rows is None else len(captures.rows)
    found = 0
    for point in captures.points:
        heads, width = shape.layout(point, end)
        channels = (heads or 1) * width if captures.elements is None else len(captures.elements)
        found += rounded(4 * (1 if point == shape.logits else count) * channels)
    return found


def needed_at(shape: ModelShape, session: Session, forward: int, point: Point) -> int:
    """The same as `standing_bytes`, if the session went to a point of that forward."""
    first = 0 if forward == 0 else len(session.prompt) + forward - 1
    end = len(session.prompt) + forward
    size = history_bytes(shape, len(session.prompt), _forwards(session))
    size += forward_bytes(shape, end - first)
    return size + (value_bytes(shape, point, first, end) if is_inner(point) else 0)
