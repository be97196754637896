"""What stock transformers computes with the same weights, and how near two rows of logits are.

A stated tolerance has one meaning here: the largest difference of one logit, in units of the
standard deviation of stock's own row. Stock decides a token when its two best logits lie further
apart than that; there the tokens must be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from notebooks.harness.inprocess import Local

#: Largest |difference| of one logit ÷ standard deviation of the row, by dtype.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}
#: Largest L2 norm of the difference of one token's residual ÷ norm of stock's, by dtype; rounding
#: adds up over layers, so this many times what stock's own two attentions differ by is allowed too.
RESIDUAL_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
OWN_SPREADS = 2.0

Floats = np.ndarray[Any, np.dtype[np.float32]]


@torch.inference_mode()
def generate(model: PreTrainedModel, ids: Sequence[int], new_tokens: int) -> tuple[int, ...]:
    """Greedy tokens of stock `generate`."""
    prompt = torch.tensor([list(ids)], device=model.device)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    assert isinstance(output, Tensor)
    return tuple(output[0, len(ids) :].tolist())


@torch.inference_mode()
def forced_logits(model: PreTrainedModel, ids: Sequence[int], tokens: Sequence[int]) -> Floats:
    """Stock logits [forwards, vocabulary] where every forward is fed what the session generated."""
    cache = DynamicCache(config=model.config)
    rows = []
    feeds = [list(ids), *([token] for token in tokens[:-1])]
    for feed in feeds:
        output = model(
            torch.tensor([feed], device=model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        rows.append(output.logits[0, -1].float().cpu().numpy())
    return np.stack(rows)


@torch.inference_mode()
def layer_outputs(local: Local, model: PreTrainedModel, ids: Sequence[int]) -> list[Floats]:
    """Stock residual stream [tokens, hidden] after every layer, of one whole prompt."""
    found: list[Floats] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found.append(hidden[0].float().cpu().numpy())

    layers = model.get_submodule(local.model.anatomy.layers_path)
    hooks = [layer.register_forward_hook(note) for layer in layers.children()]
    try:
        model(torch.tensor([list(ids)], device=model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def eager_twin(local: Local) -> PreTrainedModel:
    """Stock transformers with these weights and its eager attention."""

    def change(config: Any) -> None:
        config._attn_implementation_internal = "eager"

    return local.model.stock(change)


def length_apart(rows: Floats, stock: Floats) -> float:
    """The largest distance of one token's vector from stock's, relative to its length."""
    far = np.linalg.norm(rows - stock, axis=-1) / np.linalg.norm(stock, axis=-1)
    return float(far.max())


def distance(rows: Any, stock: Any) -> Floats:
    """By row: the largest |difference| of one element ÷ the standard deviation of stock's row."""
    rows, stock = np.asarray(rows, np.float32), np.asarray(stock, np.float32)
    return np.abs(rows - stock).max(-1) / stock.std(-1)


def undecided(stock: Floats, tolerance: float) -> Any:
    """By row: True where stock's two best logits lie within the tolerance of each other."""
    best = np.sort(stock, -1)[:, -2:]
    return (best[:, 1] - best[:, 0]) / stock.std(-1) <= tolerance
