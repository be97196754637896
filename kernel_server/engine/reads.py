"""Answers to questions about a stop: summaries, elements, logit lens, capture. Changes nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernel_server.engine.attribution import attribute
from kernel_server.engine.comparing import compare
from kernel_server.engine.held import Captured, SessionTensors
from kernel_server.engine.lens_values import head_at
from kernel_server.engine.logs import Log
from kernel_server.engine.segments import Segments
from kernel_server.engine.variables import summarize
from kernel_server.models.routers import RouterReading
from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import (
    BadArgument,
    BadMessage,
    NotFinished,
    NotStopped,
    NotSupported,
    QuotaExceeded,
)
from kernel_server.protocol.location import (
    EMBEDDING,
    final_norm_point,
    is_inner,
    location_at,
    logits_point,
    parse_location,
)
from kernel_server.state.instructions import ReadTensors

#: Tensors up to this many bytes travel inside the reply.
INLINE_BYTES = 64 << 10
#: Rows put through the head at a time: bounds the logits held at once.
LENS_ROWS = 64
#: Most rows and entries per row a lens answers.
MAX_LENS_ROWS = 4096
MAX_TOP_K = 1000
#: What a router chose travels inside the reply, whole: less than a frame.
ROUTER_BYTES = 6 << 20

#: Opens a download for an owner: (owner, source) -> transfer id.
Offer = Callable[[str, "TensorSource"], str]


def to_array(tensor: Tensor) -> Array:
    """A tensor as raw bytes with its own dtype."""
    tensor = tensor.detach().contiguous().cpu()
    dtype = str(tensor.dtype).removeprefix("torch.")
    raw = tensor.flatten().view(torch.uint8).numpy() if tensor.numel() else None
    return Array(dtype, tuple(tensor.shape), raw.data if raw is not None else b"")


class TensorSource:
    """A tensor at a stop, `[tokens, width]` in chunks, read piece by piece.

    Tensors at stops are never written, so pieces read later are of the same stop.
    """

    def __init__(self, chunks: list[Tensor]) -> None:
        self._chunks = [c.contiguous() for c in chunks]
        rows = sum(c.shape[0] for c in chunks)
        self.shape: tuple[int, ...] = (rows, *chunks[0].shape[1:])
        self.dtype = str(chunks[0].dtype).removeprefix("torch.")
        self.nbytes = sum(c.numel() * c.element_size() for c in chunks)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes `offset` to `offset + length` of the whole tensor."""
        parts = []
        start = 0
        for chunk in self._chunks:
            size = chunk.numel() * chunk.element_size()
            low, high = max(offset - start, 0), min(offset + length - start, size)
            if low < high:
                flat = chunk.flatten().view(torch.uint8)
                parts.append(flat[low:high].cpu().numpy().tobytes())
            start += size
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Reader:
    """Reads a session's tensors for its owner."""

    def __init__(
        self, segments: Segments, offer: Offer, texts: Callable[[int], str] | None
    ) -> None:
        self._segments = segments
        self._num_layers = segments.num_layers
        self._offer = offer
        self._texts = texts

    def read(
        self, errand: ReadTensors, held: SessionTensors, beside: Sequence[SessionTensors] = ()
    ) -> Any:
        """The response to a read request, or to a question for which scratch forks were run."""
        match errand.message:
            case m.Preview():
                return self._preview(errand, held, beside[0])
            case m.ReadAttention():
                return self._attention(errand, held)
            case m.ReadSites():
                return self._sites(errand, held)
            case m.ReadLensMap():
                return self._lens_map(errand, held)
            case m.ReadAttribution():
                return self._attribution(errand, held)
            case m.ReadRouter():
                return self._router(errand, held)
            case m.ReadDiff():
                return compare(self._segments, errand, beside[0].streams, held.streams)
            case m.ReadValue():
                return self._value(errand, held)
            case m.ReadLens():
                return self._lens(errand, held)
            case m.ReadCapture():
                return self._capture(errand, held)
            case m.ReadLog():
                return held.logs.get(errand.message.breakpoint_id, Log()).read(errand.message)
            case m.ReadLogits():
                if held.last_logits is None:
                    raise NotFinished("no forward of this session is finished yet")
                return self._tensor(errand.owner, [held.last_logits.float()[None]], flat=True)
        raise BadMessage(f"{type(errand.message).__name__} is not a read request")

    # -- the tensor at the stop -----------------------------------------------------------------

    def _value(self, errand: ReadTensors, held: SessionTensors) -> Any:
        forward = held.standing()
        rows = [chunk[0] for chunk in self._segments.value(forward)]
        rows = select(rows, errand.rows, errand.channels)
        if errand.message.what == "summary":
            location = str(location_at(forward.point, self._num_layers))
            return _with_heads(summarize(rows, location), errand.heads)
        return self._tensor(errand.owner, _by_head(rows, errand.heads))

    def _tensor(self, owner: str, rows: list[Tensor], flat: bool = False) -> m.TensorReply:
        source = TensorSource([row.flatten() for row in rows] if flat else rows)
        inline, transfer_id = None, None
        if source.nbytes <= INLINE_BYTES:
            inline = Array(source.dtype, source.shape, source.read(0, source.nbytes))
        else:
            transfer_id = self._offer(owner, source)
        return m.TensorReply(
            dtype=source.dtype,
            shape=source.shape,
            nbytes=source.nbytes,
            data=inline,
            transfer_id=transfer_id,
        )

    # -- logit lens -------------------------------------------------------------------------------

    def _lens(self, errand: ReadTensors, held: SessionTensors) -> m.LensReply:
        request: m.ReadLens = errand.message
        if not 1 <= request.top_k <= MAX_TOP_K:
            raise BadArgument(f"top_k is {request.top_k}: choose 1 to {MAX_TOP_K}")
        held.standing()
        if request.every_layer or request.layers is not None:
            names, positions, logits = self._lens_of_layers(request, held)
        else:
            names, positions, logits = self._lens_of_stop(errand, held)
        return self._distributions(logits.float(), request.top_k, names, positions)

    def _distributions(
        self, logits: Tensor, top_k: int, names: Sequence[str], positions: Sequence[int]
    ) -> m.LensReply:
        """The most probable tokens of each row of logits `[rows, vocabulary]`, float32."""
        top_k = min(top_k, logits.shape[-1])
        log_probabilities = logits.log_softmax(-1)
        top = log_probabilities.topk(top_k, -1)
        # 0 * -inf is nan: tokens the model excludes add nothing to the entropy
        terms = log_probabilities.exp() * log_probabilities.clamp_min(-1e30)
        ids = top.indices.cpu()
        texts = self._texts or (lambda token_id: "")
        return m.LensReply(
            rows=tuple(names),
            positions=tuple(positions),
            token_ids=to_array(ids),
            texts=tuple(tuple(texts(i) for i in row) for row in ids.tolist()),
            probabilities=to_array(top.values.exp()),
            entropy=to_array(-terms.sum(-1)),
        )

    def _lens_of_stop(
        self, errand: ReadTensors, held: SessionTensors
    ) -> tuple[list[str], list[int], Tensor]:
        forward = held.standing()
        point = forward.point
        rows = torch.cat(select([c[0] for c in self._segments.value(forward)], errand.rows, None))
        if rows.shape[0] > MAX_LENS_ROWS:
            raise BadArgument(
                f"the lens of {rows.shape[0]} tokens is more than {MAX_LENS_ROWS} at a time:"
                " choose tokens"
            )
        name = str(location_at(point, self._num_layers))
        if point == logits_point(self._num_layers):
            positions = [forward.start + len(forward.token_ids) - 1]
            return [name], positions, rows
        chosen = errand.rows if errand.rows is not None else range(rows.shape[0])
        positions = [forward.start + row for row in chosen]
        normed = point == final_norm_point(self._num_layers)
        return [name] * rows.shape[0], positions, self._head(rows, normed=normed)

    def _lens_of_layers(
        self, request: m.ReadLens, held: SessionTensors
    ) -> tuple[list[str], list[int], Tensor]:
        """The last token fed, at points of this forward that have been reached."""
        forward = held.standing()
        last_rows = held.last_rows()
        reached = len(last_rows)
        points = (
            list(range(reached)) if request.every_layer else [n + 1 for n in request.layers or ()]
        )
        for point in points:
            if not EMBEDDING <= point <= self._num_layers:
                raise BadArgument(
                    f"layer {point - 1}: the model has layers 0 to {self._num_layers - 1}"
                    " (-1 for the embedding)"
                )
            if point >= reached:
                raise NotSupported(
                    f"layer {point - 1} has not run yet in this forward ({reached - 1} layers"
                    " have): run on to it first"
                )
        if not points:
            raise BadArgument("choose at least one layer")
        names = [str(location_at(point, self._num_layers)) for point in points]
        position = forward.start + len(forward.token_ids) - 1
        rows = torch.stack([last_rows[point] for point in points])
        return names, [position] * len(points), self._head(rows, normed=False)

    def _head(self, rows: Tensor, *, normed: bool) -> Tensor:
        """Logits `[rows, vocabulary]` of residual rows `[rows, hidden]`."""
        pieces = [self._segments.lens(piece, normed=normed) for piece in rows.split(LENS_ROWS)]
        return torch.cat(pieces)

    # -- answers from scratch forks ---------------------------------------------------------------

    def _preview(
        self, errand: ReadTensors, after: SessionTensors, before: SessionTensors
    ) -> m.PreviewReply:
        request: m.Preview = errand.message
        arms = [self._segments.logits(held.standing()).float() for held in (before, after)]
        position = errand.first_token + len(after.standing().token_ids) - 1
        rows = [
            self._distributions(arm[None], request.top_k, ("logits",), (position,)) for arm in arms
        ]
        plain, edited = (arm.log_softmax(-1) for arm in arms)
        # a token banned in both has no part in it, and 0 * -inf would be nan
        terms = edited.exp() * (edited.clamp_min(-1e30) - plain.clamp_min(-1e30))
        sent = [
            self._tensor(errand.owner, [arm[None]], flat=True) if request.logits else None
            for arm in arms
        ]
        return m.PreviewReply(
            before=rows[0],
            after=rows[1],
            kl=max(float(terms.sum()), 0.0),
            logits_before=sent[0],
            logits_after=sent[1],
            elements_changed=errand.changed,
        )

    def _attention(self, errand: ReadTensors, held: SessionTensors) -> m.AttentionReply:
        ((_, rows),) = held.caught.items()
        count, heads = sum(row.shape[0] for row in rows), errand.heads
        assert heads is not None
        chosen = errand.rows if errand.rows is not None else range(count)
        keys = rows[0].shape[1] // heads
        elements = errand.channels if errand.channels is not None else range(heads * keys)
        return m.AttentionReply(
            heads=tuple(elements[i] // keys for i in range(0, heads * keys, keys)),
            positions=tuple(errand.first_token + row for row in chosen),
            weights=self._tensor(errand.owner, _by_head(rows, heads)),
        )

    def _sites(self, errand: ReadTensors, held: SessionTensors) -> m.SitesReply:
        request: m.ReadSites = errand.message
        values = []
        for point, found in sorted(held.caught.items()):
            name = str(location_at(point, self._num_layers))
            heads = self._segments.layout(point).heads if is_inner(point) else None
            if isinstance(found, m.Summary):
                values.append(m.SiteValue(location=name, summary=_with_heads(found, heads)))
            else:
                tensor = self._tensor(errand.owner, _by_head(found, heads))
                values.append(m.SiteValue(location=name, tensor=tensor))
        asked = {
            str(parse_location(name, self._num_layers)): i
            for i, name in enumerate(request.locations)
        }
        values.sort(key=lambda value: asked[value.location])
        count = len(held.standing().token_ids)
        rows = errand.rows if errand.rows is not None else range(count)
        return m.SitesReply(
            values=tuple(values), positions=tuple(errand.first_token + row for row in rows)
        )

    def _lens_map(self, errand: ReadTensors, held: SessionTensors) -> m.LensReply:
        request: m.ReadLensMap = errand.message
        count = len(held.standing().token_ids)
        rows = errand.rows if errand.rows is not None else range(count)
        positions = [errand.first_token + row for row in rows]
        names, parts = [], []
        for location in request.locations:
            point = parse_location(location, self._num_layers).point(self._num_layers)
            names += [str(location_at(point, self._num_layers))] * len(positions)
            # a location at a time: the logits of all would be as many vocabularies as cells
            head = head_at(self._segments, point)
            blocks = torch.cat(held.caught[point]).split(LENS_ROWS)
            parts += [self._distributions(head(b).float(), request.top_k, (), ()) for b in blocks]
        return m.LensReply(
            rows=tuple(names),
            positions=tuple(positions) * len(request.locations),
            token_ids=_stacked([part.token_ids for part in parts]),
            texts=tuple(row for part in parts for row in part.texts),
            probabilities=_stacked([part.probabilities for part in parts]),
            entropy=_stacked([part.entropy for part in parts]),
        )

    def _attribution(self, errand: ReadTensors, held: SessionTensors) -> m.AttributionReply:
        vectors = {point: torch.cat(rows)[0] for point, rows in held.caught.items()}
        parts = attribute(self._segments, vectors, errand.message.token_id)
        text = self._texts(parts.token_id) if self._texts is not None else ""
        return m.AttributionReply(
            token_id=parts.token_id,
            text=text,
            kinds=parts.kinds,
            layers=parts.layers,
            heads=parts.heads,
            values=to_array(parts.values),
            logit=parts.logit,
            rest=parts.logit - float(parts.values.sum()),
            note=parts.note,
        )

    def _router(self, errand: ReadTensors, held: SessionTensors) -> m.RouterReply:
        (reading,) = held.caught.values()
        assert isinstance(reading, RouterReading)
        arrays = [reading.experts, reading.weights.float(), reading.logits.float()]
        nbytes = sum(array.numel() * array.element_size() for array in arrays)
        if nbytes > ROUTER_BYTES:
            raise QuotaExceeded(
                f"what the router chose for {len(reading.logits)} tokens is {nbytes:,} bytes, one"
                f" answer holds {ROUTER_BYTES:,}: ask in a decode, or of a shorter prompt",
                needed=nbytes,
                limit=ROUTER_BYTES,
            )
        experts, weights, logits = map(to_array, arrays)
        return m.RouterReply(
            first_token=errand.first_token, experts=experts, weights=weights, logits=logits
        )

    # -- capture -------------------------------------------------------------------------------

    def _capture(self, errand: ReadTensors, held: SessionTensors) -> m.CaptureReply:
        now = held.captured() if held.forward is not None else None
        if errand.message.span == "forward":
            found = now if now is not None else (held.history[-1] if held.history else None)
            if found is None:
                raise NotStopped("nothing has run in this session yet: continue it first")
            return self._capture_reply(found)
        parts = [*held.history, *([now] if now is not None else [])]
        if not parts:
            raise NotStopped("nothing has run in this session yet: continue it first")
        points = self._num_layers + 1
        return self._capture_reply(
            Captured(
                parts[0].first_token,
                torch.cat([_padded(p.norm, points) for p in parts], 1),
                torch.cat([_padded(p.largest, points) for p in parts], 1),
                sum(
                    (_padded(p.num_nan[:, None], points, 0)[:, 0] for p in parts[1:]),
                    _padded(parts[0].num_nan[:, None], points, 0)[:, 0],
                ),
            )
        )

    def _capture_reply(self, captured: Captured) -> m.CaptureReply:
        points = captured.norm.shape[0]
        return m.CaptureReply(
            locations=tuple(str(location_at(p, self._num_layers)) for p in range(points)),
            first_token=captured.first_token,
            norm=to_array(captured.norm),
            largest=to_array(captured.largest),
            num_nan=to_array(captured.num_nan),
        )


def _stacked(arrays: list[Array]) -> Array:
    """The rows of several arrays as one."""
    return Array.from_numpy(np.concatenate([array.numpy() for array in arrays]))


def _by_head(rows: list[Tensor], heads: int | None) -> list[Tensor]:
    """Rows `[tokens, elements]` as `[tokens, heads, channels]`."""
    if heads is None:
        return rows
    return [chunk.reshape(chunk.shape[0], heads, -1) for chunk in rows]


def _with_heads(summary: m.Summary, heads: int | None) -> m.Summary:
    if heads is None:
        return summary
    tokens, elements = summary.shape
    return dataclasses.replace(summary, shape=(tokens, heads, elements // heads))


def _padded(values: Tensor, points: int, fill: float = math.nan) -> Tensor:
    """`values` [reached, tokens] with rows of `fill` for the points not reached."""
    missing = points - values.shape[0]
    if not missing:
        return values
    return torch.cat([values, values.new_full((missing, values.shape[1]), fill)])


def select(
    chunks: list[Tensor], rows: tuple[int, ...] | None, channels: tuple[int, ...] | None
) -> list[Tensor]:
    """The chosen rows and channels of `[tokens, width]` chunks."""
    if rows is not None:
        picked = []
        for row in rows:
            for chunk in chunks:
                if row < chunk.shape[0]:
                    picked.append(chunk[row])
                    break
                row -= chunk.shape[0]
        chunks = [torch.stack(picked)] if picked else [chunks[0][:0]]
    if channels is not None:
        index = torch.tensor(channels, device=chunks[0].device)
        chunks = [chunk.index_select(1, index) for chunk in chunks]
    return chunks
