"""True geometries of known models, filled with random weights from a seed.

For work whose speed or exactness does not depend on what the model says. Weights are made on the
device in the dtype asked for, layer by layer, so a 13B model takes seconds on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kernel_server.protocol.errors import BadArgument

#: (done, total, what is being done); the unit of done and total is the caller's business.
Progress = Callable[[int, int, str], None]

_LLAMA_3 = {
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
}

#: name -> (model type, configuration), as published with the models.
GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
    ),
    "llama-2-13b": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
    ),
    "llama-3-8b": (
        "llama",
        {
            **_LLAMA_3,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
    ),
    "llama-3.2-1b": (
        "llama",
        {
            **_LLAMA_3,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-8b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
        },
    ),
    "mistral-7b": (
        "mistral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "rms_norm_eps": 1e-5,
        },
    ),
    "gpt2": (
        "gpt2",
        {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
    ),
    "gpt2-xl": (
        "gpt2",
        {"vocab_size": 50257, "n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024},
    ),
}


def geometry_config(name: str) -> PretrainedConfig:
    """The configuration of a known geometry, or BadArgument naming those there are."""
    if name not in GEOMETRIES:
        raise BadArgument(
            f"unknown geometry {name!r}: choose one of {', '.join(sorted(GEOMETRIES))}"
        )
    kind, fields = GEOMETRIES[name]
    return AutoConfig.for_model(kind, **fields)


def random_model(
    config: PretrainedConfig,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A model of this configuration with random weights, the same for one seed and device type.

    Raises torch.OutOfMemoryError if the device has no room.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _make_real(model, torch.device(device))
    model.tie_weights()
    generator = torch.Generator(device=device).manual_seed(seed)
    done: set[int] = set()
    # One pass over the modules in order: the layers make up most of it.
    modules = [m for m in model.modules() if m._parameters]
    with torch.no_grad():
        for index, module in enumerate(modules):
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in done:
                    done.add(id(parameter))
                    _fill(module, name, parameter, generator)
            if progress is not None:
                progress(index + 1, len(modules), "making random weights")
    return model.eval()


def _make_real(model: PreTrainedModel, device: torch.device) -> None:
    """Give every parameter memory; modules with buffers are built again, on the device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty_like(parameter, device=device), requires_grad=False
                )
        if any(buffer is not None for buffer in module._buffers.values()):
            _rebuild_buffers(model, module, device)


def _rebuild_buffers(model: PreTrainedModel, module: nn.Module, device: torch.device) -> None:
    """Buffers hold what a constructor computes (rotary frequencies): compute it for real."""
    config = getattr(module, "config", model.config)
    try:
        twin = type(module)(config=config)
    except TypeError as error:
        raise BadArgument(
            f"{type(module).__name__} of this geometry cannot be built from a configuration alone"
        ) from error
    for name in module._buffers:
        buffer = twin._buffers.get(name)
        module._buffers[name] = None if buffer is None else buffer.to(device)
    for name, value in twin.__dict__.items():
        if isinstance(value, torch.Tensor):
            module.__dict__[name] = value.to(device)


def _fill(
    module: nn.Module, name: str, parameter: nn.Parameter, generator: torch.Generator
) -> None:
    """Norm weights near one, biases small, matrices of a size that keeps every layer's say."""
    if parameter.dim() < 2:
        middle = 0.0 if name == "bias" else 1.0
        parameter.normal_(middle, 0.05, generator=generator)
    elif isinstance(module, nn.Embedding):
        parameter.normal_(0.0, 0.1, generator=generator)
    else:
        # Linear weights are [out, in], GPT-2's Conv1D ones [in, out].
        fan_in = parameter.shape[0] if hasattr(module, "nf") else parameter.shape[-1]
        parameter.normal_(0.0, 1.0 / math.sqrt(fan_in), generator=generator)
