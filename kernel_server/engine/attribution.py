"""Direct logit attribution: what each part added to the residual stream adds to one logit.

The last token's residual stream is the sum of the embedding and of what every layer's attention and
MLP added. With the scale of the final norm held at the value it had, norm and head are linear, so a
logit is the sum of what they make of each part. A head's part is its share of the attention's
output through the output projection, scaled, channel by channel, as the layer scaled the whole
(post-norms, multipliers). Source: Elhage et al., "A Mathematical Framework for Transformer
Circuits" (2021). Which vectors there are is decided by the scratch fork that caught them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_server.engine.segments import Segments
from kernel_server.protocol.errors import NotSupported
from kernel_server.protocol.location import EMBEDDING, Point, inner_point, logits_point

#: A norm that gives the same for x and x + c subtracts the mean; relative difference allowed.
_SHIFT = 1e-2
#: Shares of the heads that add up to less than this part of their sizes cancel each other.
_CANCELLED = 1e-2


@dataclass(frozen=True, slots=True)
class Parts:
    """Parts of a logit, in the order of a forward; `values` float32 [parts], on the CPU."""

    token_id: int
    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    values: Tensor
    logit: float
    note: str | None


def attribute(segments: Segments, vectors: Mapping[Point, Tensor], token_id: int | None) -> Parts:
    """Attribute the logit of `token_id` (None: the largest) at the forward's last position.

    vectors: by point, the last token's vector: the embedding, each layer's `attention.output`,
    `mlp.output` and, where it has them, `attention.heads`, the last layer's output, the logits.

    Raises NotSupported where norm and head are not linear once the scale is fixed.
    """
    num_layers = segments.num_layers
    logits = vectors[logits_point(num_layers)].float()
    token = int(logits.argmax()) if token_id is None else token_id
    reader = _Reader.of(segments, vectors[num_layers], token)
    kinds, layers, heads, values = ["embedding"], [-1], [-1], [reader.part(vectors[EMBEDDING])]
    for layer in range(num_layers):
        whole = vectors[inner_point(layer, "attention.output")].double()
        left = whole
        mixed = vectors.get(inner_point(layer, "attention.heads"))
        shares = None if mixed is None else _head_shares(segments, layer, mixed, whole)
        for head, share in enumerate(shares if shares is not None else ()):
            kinds.append("head")
            layers.append(layer)
            heads.append(head)
            values.append(reader.part(share))
            left = left - share
        kinds += ["attention", "mlp"]
        layers += [layer, layer]
        heads += [-1, -1]
        values.append(reader.part(left))
        values.append(reader.part(vectors[inner_point(layer, "mlp.output")]))
    kinds.append("bias")
    layers.append(-1)
    heads.append(-1)
    values.append(reader.constant)
    logit, note = float(logits[token]), None
    if reader.capped is not None:
        logit, note = reader.capped, "the logit before the model's soft cap"
    return Parts(
        token_id=token,
        kinds=tuple(kinds),
        layers=tuple(layers),
        heads=tuple(heads),
        values=torch.stack([value.float().cpu() for value in values]),
        logit=logit,
        note=note,
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    """The linear map from a part of the residual stream to the logit, with the scale held fixed."""

    #: float64 [hidden]
    weights: Tensor
    #: the norm subtracts the mean of a part
    centres: bool
    #: what norm and head add whatever the parts are
    constant: Tensor
    #: the logit before a soft cap, where the head has one
    capped: float | None

    @classmethod
    def of(cls, segments: Segments, final: Tensor, token: int) -> _Reader:
        """Learn the map from what the model's own norm and head do.

        final: the residual stream after the last layer, [hidden].
        """
        rows = torch.stack([final, final + final.float().std().to(final.dtype), final * 0])
        normed = _normed(segments, rows).double()
        if normed.shape[-1] != final.shape[-1]:
            raise NotSupported(
                f"{segments.model.family}: its final norm is followed by a projection from"
                f" {final.shape[-1]} to {normed.shape[-1]} channels, so a logit has no parts here;"
                " compare with stop.preview()"
            )
        given, shifted, nothing = normed
        centres = bool((given - shifted).norm() <= _SHIFT * (given - nothing).norm())
        stream = final.double()
        if centres:
            stream = stream - stream.mean()
        # a channel that is exactly 0 adds nothing by any factor
        factors = torch.where(stream == 0, 0.0, (given - nothing) / stream)
        row, bias, capped = _head_row(segments, normed[:1], token)
        return cls(
            weights=factors * row,
            centres=centres,
            constant=(row * nothing).sum() + bias,
            capped=capped,
        )

    def part(self, vector: Tensor) -> Tensor:
        """What a part of the residual stream, [hidden], adds to the logit."""
        values = vector.double()
        if self.centres:
            values = values - values.mean()
        return (values * self.weights).sum()


def _normed(segments: Segments, rows: Tensor) -> Tensor:
    """The final norm of residual rows `[rows, hidden]`."""
    model = segments.model
    with torch.inference_mode():
        return model.norm(rows[None].contiguous(), *model.inputs([0] * rows.shape[0], 0))[0]


def _head_row(
    segments: Segments, normed: Tensor, token: int
) -> tuple[Tensor, Tensor, float | None]:
    """The head's weights and bias for one token, float64, in units of the logit; and the logit
    before a soft cap, where there is one."""
    model = segments.model
    head = model.model.get_output_embeddings()
    weight = head.weight[token].double()
    given = getattr(head, "bias", None)
    bias = weight.new_zeros(()) if given is None else given[token].double()
    raw = (weight * normed[0]).sum() + bias
    rows = torch.cat([normed, normed * 2]).to(model.dtype)
    with torch.inference_mode():
        logits = model.head(rows[None], *model.inputs([0, 0], 0))[:, token].double()
    if raw == 0:
        return weight, bias, None
    once, twice = (logits[0] / raw, logits[1] / (2 * raw - bias))
    if (once - twice).abs() <= 2e-2 * once.abs():
        return weight * once, bias * once, None
    if getattr(model.config, "final_logit_softcapping", None):
        return weight, bias, float(raw)
    raise NotSupported(
        f"{model.family}: its head is not linear in the final norm ({float(once):.3g} and"
        f" {float(twice):.3g} per unit), so a logit has no parts; compare with stop.preview()"
    )


def _head_shares(segments: Segments, layer: int, mixed: Tensor, whole: Tensor) -> Tensor | None:
    """What each head gives to the attention's output, float64 [heads, hidden]."""
    sites = segments.model.sites[layer]
    projection, layout = sites.output_projection, sites.layouts["attention.heads"]
    if projection is None or layout.heads is None:
        return None
    per_head = mixed.double().view(layout.heads, layout.width)
    matrix = projection.matrix.double().view(-1, layout.heads, layout.width)
    shares = torch.einsum("chw,hw->hc", matrix, per_head)
    total = shares.sum(0)
    if projection.bias is not None:
        total = total + projection.bias.double()
    # post-norms and multipliers scale every channel of the sum, so of each share; where the shares
    # cancel, the quotient is rounding, and what is wrong there is left to the attention's own part
    sure = total.abs() > _CANCELLED * shares.abs().sum(0)
    if not bool(sure.any()):
        return shares
    factors = whole / total
    usual = factors[sure].median()
    return shares * torch.where(sure, factors, usual)
