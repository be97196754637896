"""A tiny random model of every causal language model that transformers can build.

The configurations are the families' own defaults with every size shrunk; what a family needs
besides stands in `EXTRA`. What cannot be made tiny is listed with the reason, so that nothing is
left out in silence.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from tests.models import tiny

Fields = dict[str, Any]

#: Field of a configuration -> its tiny value; only fields that a family has are set.
SIZES: Fields = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size"), tiny.HIDDEN),
    **dict.fromkeys(("word_embed_proj_dim", "decoder_hidden_size", "embedding_dim"), tiny.HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dff", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers"), tiny.LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), tiny.HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), tiny.HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), tiny.KV_HEADS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "moe_num_experts": 4,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    "encoder_layers": tiny.LAYERS,
    "num_layers": tiny.LAYERS,
    **dict.fromkeys(("index_n_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("index_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    "index_topk": 8,
    "encoder_hash_byte_group_vocab": tiny.VOCAB,
    "first_k_dense_replace": 2,
    "head_dim": tiny.HEAD_DIM,
    "kv_channels": tiny.HEAD_DIM,
    "rotary_dim": 8,
    "vocab_size": tiny.VOCAB,
    "vocab_size_per_layer_input": tiny.VOCAB,
    "hidden_size_per_layer_input": 8,
    "sliding_window": tiny.WINDOW,
    "attention_chunk_size": tiny.WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {k: v for k, v in tiny.LATENT.items() if k.endswith(("_rank", "head_dim"))}
_MLA: Fields = {**_LATENT, "num_key_value_heads": tiny.HEADS, "head_dim": 8}
_DECODER: Fields = {"is_decoder": True}

#: What a family needs besides small sizes; None: as `SIZES` says.
EXTRA: dict[str, Fields] = {
    **dict.fromkeys(
        (
            "axk1",
            "deepseek_v2",
            "deepseek_v3",
            "glm4_moe_lite",
            "mistral4",
            "youtu",
        ),
        _MLA,
    ),
    "minicpm3": {**_MLA, "head_dim": None},
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        ),
        _DECODER,
    ),
    "cohere_compass_text": {"layer_types": ["full_attention"] * tiny.LAYERS},
    "dots3_note_text": {"num_key_value_heads": tiny.HEADS, "qk_rope_head_dim": 8},
    "gemma3n_text": tiny.REFUSED["gemma3n"][1],
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "longcat_flash": {"num_layers": 3},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": _DECODER,
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": tiny.WINDOW},
}


#: Variants of a family that run otherwise than its defaults: name -> (model type, what it needs).
VARIANTS: dict[str, tuple[str, Fields]] = {
    "falcon (multi-query)": ("falcon", {"multi_query": True, "new_decoder_architecture": False}),
    "falcon (alibi)": ("falcon", {"alibi": True, "new_decoder_architecture": False}),
    "falcon (new decoder)": ("falcon", {"new_decoder_architecture": True}),
    "phi3 (longrope)": tiny.OTHERS["phi3-longrope"],
    "qwen3 (sliding)": tiny.OTHERS["qwen3-sliding"],
}
#: A model with more parameters than this is not tiny.
_MOST_PARAMETERS = 15_000_000


class CannotBeTiny(Exception):
    """No tiny model of this family; says why in one line."""


def names() -> list[str]:
    """Every family of the installed transformers, and variants of some."""
    return sorted([*_classes(), *VARIANTS])


def model(name: str) -> PreTrainedModel:
    """A tiny random model of a family or variant, every parameter perturbed, in float32.

    Raises CannotBeTiny.
    """
    try:
        config = tiny_config(name)
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise CannotBeTiny(f"transformers raises {type(error).__name__} for small sizes") from error
    count = sum(parameter.numel() for parameter in shapes.parameters())
    if count > _MOST_PARAMETERS:
        raise CannotBeTiny(f"{count / 1e6:.0f} million parameters at the smallest")
    return tiny.random_model(config)


def tiny_config(name: str) -> PretrainedConfig:
    """The configuration of a family or variant, made tiny."""
    kind, own = VARIANTS.get(name, (name, {}))
    cls = _classes()[kind]
    return cls(**{**fields(cls()), **EXTRA.get(kind, {}), **own})


def fields(config: PretrainedConfig) -> Fields:
    """The tiny sizes of what a configuration has, parts included."""
    known = config.to_dict().keys() | config.attribute_map.keys()
    sizes = {
        config.attribute_map.get(name, name): value
        for name, value in SIZES.items()
        if name in known
    }
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            sizes[name] = fields(part)
            if "text" not in name and "num_hidden_layers" in sizes[name]:
                sizes[name]["num_hidden_layers"] = 2  # an eye or an ear
    return sizes


def _classes() -> dict[str, type[PretrainedConfig]]:
    return {found.model_type: found for found in MODEL_FOR_CAUSAL_LM_MAPPING}
