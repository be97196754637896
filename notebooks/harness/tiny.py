"""Small models of several families with random weights, as folders: what differs is the code.

Small enough for seconds on one CPU core, large enough to have several page groups, heads that share
keys, sliding windows shorter than the prompt, experts, soft caps and learnt positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from kernel_server.models.geometry import random_model

_COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
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
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": _HEADS,
    "mistral": {"sliding_window": 24},
    "gemma2": _HEADS | {"sliding_window": 24, "query_pre_attn_scalar": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {},
    "gpt_neox": _ALL_HEADS,
    "opt": _ALL_HEADS | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, "n_inner": 128},
}


def make_folder(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny model of this family, without a tokenizer; returns its folder."""
    own = FAMILIES[family]
    fields = {"vocab_size": 320, "eos_token_id": None} | own if family == "gpt2" else _COMMON | own
    config = AutoConfig.for_model(family, **fields)
    home = folder / family
    random_model(config, seed, torch.float32, "cpu").save_pretrained(home)
    return home
