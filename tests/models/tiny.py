"""Tiny random models of many families, made in the test, every parameter perturbed.

Norms and biases of a freshly made model are trivial (ones and zeros): a lost norm would not show.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, WINDOW = 6, 64, 4, 2, 16, 97, 8

LLAMA: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
}
GPT: dict[str, Any] = {
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "vocab_size": VOCAB,
    "n_positions": 256,
}
OPT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "ffn_dim": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "word_embed_proj_dim": HIDDEN,
    "max_position_embeddings": 256,
}
EVERY_OTHER = ["sliding_attention", "full_attention"] * (LAYERS // 2)
EVERY_THIRD = (["sliding_attention"] * 2 + ["full_attention"]) * (LAYERS // 3)
MIXED = {**LLAMA, "sliding_window": WINDOW, "layer_types": EVERY_OTHER}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    **PLAIN,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}

#: name -> (model type, configuration): the families that must run.
REQUIRED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "mistral": ("mistral", {**LLAMA, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", LLAMA),
    "gemma2": ("gemma2", {**MIXED, "query_pre_attn_scalar": HEAD_DIM}),
    "gemma3": (
        "gemma3_text",
        {
            **LLAMA,
            "sliding_window": WINDOW,
            "layer_types": EVERY_THIRD,
            "query_pre_attn_scalar": HEAD_DIM,
        },
    ),
    "gpt2": ("gpt2", {**GPT, "bos_token_id": 1, "eos_token_id": 2}),
    "opt": ("opt", OPT),
    "mixtral": (
        "mixtral",
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "phi3": ("phi3", LLAMA),
    "gpt_neox": ("gpt_neox", PLAIN),
}

#: Families with something of their own: odd rotaries, sinks, latent attention, parallel layers …
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-sliding": ("qwen3", {**MIXED, "use_sliding_window": True, "max_window_layers": 3}),
    "gpt_oss": ("gpt_oss", {**MIXED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3-longrope": (
        "phi3",
        {
            **LLAMA,
            "original_max_position_embeddings": 12,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 12,
            },
        },
    ),
    "qwen2_moe": ("qwen2_moe", {**LLAMA, **EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("qwen3_moe", {**LLAMA, **EXPERTS}),
    "olmo": ("olmo", LLAMA),
    "olmo2": ("olmo2", LLAMA),
    "olmo3": ("olmo3", {**LLAMA, "sliding_window": WINDOW}),
    "olmoe": ("olmoe", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("granite", LLAMA),
    "granitemoe": ("granitemoe", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": ("smollm3", LLAMA),
    "starcoder2": ("starcoder2", {**LLAMA, "sliding_window": WINDOW}),
    "cohere": ("cohere", LLAMA),
    "cohere2": ("cohere2", MIXED),
    "glm": ("glm", {**LLAMA, "partial_rotary_factor": 0.5}),
    "glm4": ("glm4", {**LLAMA, "partial_rotary_factor": 0.5}),
    "phi": ("phi", PLAIN),
    "phimoe": ("phimoe", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "stablelm": ("stablelm", LLAMA),
    "persimmon": ("persimmon", PLAIN),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "jetmoe": ("jetmoe", {**LLAMA, "num_local_experts": 4, "kv_channels": 16}),
    "nemotron": ("nemotron", LLAMA),
    "helium": ("helium", LLAMA),
    "ernie4_5": ("ernie4_5", LLAMA),
    "exaone4": ("exaone4", MIXED),
    "arcee": ("arcee", LLAMA),
    "apertus": ("apertus", LLAMA),
    "seed_oss": ("seed_oss", LLAMA),
    "bitnet": ("bitnet", LLAMA),
    "gemma": ("gemma", LLAMA),
    "biogpt": ("biogpt", PLAIN),
    "ctrl": ("ctrl", {**GPT, "dff": 96}),
    "bert-decoder": ("bert", {**PLAIN, "is_decoder": True}),
}

#: What the attention function cannot run; some of it the Cache route can.
#: name -> (model type, configuration, words the refusal must contain).
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": (
        "mamba",
        {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB},
        "recurrent state",
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **LLAMA,
            **EXPERTS,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": (["linear_attention"] * 2 + ["full_attention"]) * 2,
        },
        "recurrent state",
    ),
    "dynamic rope": (
        "llama",
        {
            **LLAMA,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        },
        "dynamic rotary scaling",
    ),
    "gemma3n": (
        "gemma3n_text",
        {
            **LLAMA,
            "intermediate_size": [96] * LAYERS,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "sliding_window": WINDOW,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.0] * LAYERS,
            "layer_types": EVERY_THIRD,
        },
        "residual stream",
    ),
    "bert": ("bert", PLAIN, "not causal"),
    "falcon": (
        "falcon",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "vocab_size": VOCAB,
            "new_decoder_architecture": True,
            "num_kv_heads": KV_HEADS,
        },
        "attention interface",
    ),
    "bloom": (
        "bloom",
        {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCAB},
        "attention interface",
    ),
    "gptj": ("gptj", {**GPT, "rotary_dim": 8}, "attention interface"),
    "diffllama": ("diffllama", LLAMA, "calls attention 2 times"),
    "doge": ("doge", LLAMA, "attention mask of its own"),
    "minimax": ("minimax", {**LLAMA, "num_local_experts": 4}, "calls attention 0 times"),
    "llama4": (
        "llama4_text",
        {
            **LLAMA,
            "num_local_experts": 4,
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 96,
        },
        "load check",
    ),
}


def build(
    kind: str, fields: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A random model of this configuration, norms and biases included."""
    return random_model(AutoConfig.for_model(kind, **fields), dtype, seed)


def random_model(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """The same for a configuration."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def family(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model of one of the families above."""
    kind, fields = {**REQUIRED, **OTHERS}[name]
    return build(kind, fields, dtype)
