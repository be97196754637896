"""Attention weights: computed beside the kernel to be looked at, and used in its place when edited.

The weights are those of the family's own eager function where it has one (its scale, soft cap,
sinks, and float32 softmax), else of plain scaled dot products. Looking at them never changes what
attention gives; only edited weights are multiplied with the values here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """The family's own eager attention, which its modeling file defines beside its modules."""
    home = sys.modules.get(type(module).__module__)
    found = getattr(home, "eager_attention_forward", None)
    return found if callable(found) else None


def added_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`mask` [tokens, keys], True where visible, as scores are added to: [1, 1, tokens, keys]."""
    if mask is None:
        return None
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return added.masked_fill_(~mask, torch.finfo(dtype).min)[None, None]


def attention_weights(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Softmax weights [1, heads, tokens, keys] of `query` over `key`, zero where masked.

    mask: [tokens, keys], True where visible; None where every key is. Rows sum to 1, or to less in
    families with sinks.
    """
    heads, tokens, keys = query.shape[1], query.shape[2], key.shape[2]
    function = eager_function(module)
    if function is not None:
        added = added_mask(mask, query.dtype)
        if added is None:  # some families' eager functions do not go without
            added = query.new_zeros((1, 1, tokens, keys))
        weights = function(module, query, key, value, added, **options)[1]
        if isinstance(weights, Tensor) and weights.shape == (1, heads, tokens, keys):
            return weights
    scale = options.get("scaling")
    if scale is None:
        scale = query.shape[-1] ** -0.5
    shared = key.repeat_interleave(heads // key.shape[1], 1)
    scores = (query @ shared.transpose(2, 3)).float() * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(query.dtype)


def weigh(weights: Tensor, value: Tensor) -> Tensor:
    """`weights` [1, heads, tokens, keys] times `value` [1, kv_heads, keys, dim].

    Returns [1, tokens, heads, dim], contiguous.
    """
    shared = value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
    return (weights.to(value.dtype) @ shared).transpose(1, 2).contiguous()


def spread(weights: Tensor, first: int, width: int) -> Tensor:
    """Weights over the keys from `first` on as [1, tokens, heads * width], zero elsewhere."""
    _, heads, tokens, keys = weights.shape
    whole = weights.new_zeros((1, tokens, heads, width))
    whole[..., first : first + keys] = weights.transpose(1, 2)
    return whole.view(1, tokens, heads * width)


def window_of(put: Tensor, like: Tensor, first: int, mask: Tensor | None) -> Tensor:
    """The inverse of `spread`, shaped as `like`; what the mask hides has no weight."""
    _, heads, tokens, keys = like.shape
    whole = put.view(1, tokens, heads, -1)
    weights = whole[..., first : first + keys].transpose(1, 2)
    return weights if mask is None else weights * mask
