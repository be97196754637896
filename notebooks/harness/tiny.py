"""Small models of several families with random weights, as folders: what differs is the code.

Small enough for seconds on one CPU core, large enough to have several page groups, heads that share
keys, sliding windows shorter than the prompt, experts, soft caps and learnt positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

_COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_HEADS = {"head_dim": 16}
_ALL_HEADS = {"num_key_value_heads": 4}

#: family -> what its configuration differs by
_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": _HEADS | {"sliding_window": 12, "query_pre_attn_scalar": 16},
    "mistral": {"sliding_window": 12},
    "opt": _ALL_HEADS | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64, "n_layer": 5, "n_head": 4, "n_positions": 256, "n_inner": 128},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": {"use_parallel_residual": True},
}
#: family -> dtypes it is run in. Experts chosen by nearly equal scores: in bfloat16 rounding alone
#: may choose others than stock's, which no tolerance on residual streams can hold.
FAMILIES: dict[str, tuple[str, ...]] = {
    "llama": ("float32", "bfloat16"),
    "gemma2": ("float32",),
    "mistral": ("bfloat16",),
    "opt": ("bfloat16",),
    "gpt2": ("float32",),
    "mixtral": ("float32",),
}


def make_folder(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny model of this family, without a tokenizer; returns its folder."""
    own = _OWN[family]
    common = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": None}
    config = AutoConfig.for_model(family, **(common if family == "gpt2" else _COMMON) | own)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # The usual small start would leave every layer next to nothing to say.
            spread = 0.05 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.add_(torch.empty_like(parameter).normal_(0.0, spread, generator=generator))
    logging.disable_progress_bar()
    model.save_pretrained(folder / family)
    return folder / family
