"""Random weights at true geometries: real buffers, one seed one model, layers that matter."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kernel_server.engine.loading import serve
from kernel_server.models.geometry import GEOMETRIES, geometry_config, random_model
from kernel_server.models.registry import _hash_random
from tests.models import tiny

torch.set_num_threads(1)


def small(kind: str = "llama", seed: int = 0):
    fields = tiny.LLAMA if kind == "llama" else tiny.GPT
    return random_model(AutoConfig.for_model(kind, **fields), seed, torch.float32, "cpu")


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_known_geometry_can_be_built(name: str) -> None:
    config = geometry_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    billions = sum(p.numel() for p in model.parameters()) / 1e9

    expected = {
        "llama-2-7b": 6.7,
        "llama-2-13b": 13.0,
        "llama-3-8b": 8.0,
        "llama-3.2-1b": 1.2,
        "qwen3-8b": 8.2,
        "mistral-7b": 7.2,
        "gpt2": 0.12,
        "gpt2-xl": 1.56,
    }
    assert abs(billions - expected[name]) < 0.06


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_random_models_are_complete_and_pass_the_load_check(kind: str) -> None:
    model = small(kind)
    made = AutoModelForCausalLM.from_config(model.config)

    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    for (name, buffer), (_, expected) in zip(
        model.named_buffers(), made.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, expected), name
    assert serve(model, kv_memory_bytes=4 << 20).report.passed


def test_one_seed_gives_one_model_and_another_another() -> None:
    first, again, other = small(), small(), small(seed=1)
    pairs = zip(first.parameters(), again.parameters(), strict=True)

    assert all(torch.equal(a, b) for a, b in pairs)
    assert _hash_random(first, 0) == _hash_random(again, 0) != _hash_random(other, 1)


def test_tied_embeddings_stay_tied() -> None:
    model = small("gpt2")

    assert model.lm_head.weight is model.transformer.wte.weight


def test_every_layer_of_a_random_model_matters() -> None:
    model = small()
    with torch.no_grad():
        states = model(torch.tensor([[5, 9, 23]]), output_hidden_states=True).hidden_states
    outputs = states[:-1]  # the last entry has passed the final norm
    moved = [(b - a).norm() / a.norm() for a, b in itertools.pairwise(outputs)]

    assert min(moved) > 0.02
