"""Quantised and adapted models: served where they are plain arithmetic, else refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kernel_server.engine.loading import resume
from kernel_server.models.registry import open_model
from kernel_server.protocol.errors import BrokenModel, UnsupportedModel
from tests.models import tiny

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    tiny.family("llama").save_pretrained(made)
    return made


def quantise(folder: Path, kind: dict[str, Any], part: str | None = None) -> None:
    """Pack a weight and say so in the configuration, as a quantised checkpoint does."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    (config if part is None else config.setdefault(part, {}))["quantization_config"] = kind
    file.write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].mul(100).clamp(-127, 127).to(torch.int8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "(bitsandbytes, 8-bit)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "(bitsandbytes, 4-bit)"),
        ({"quant_method": "gptq", "bits": 4}, "(gptq, 4-bit)"),
        ({"quant_method": "mxfp4"}, "Mxfp4Config(dequantize=True)"),
        ({"quant_method": "fp8"}, "model.dequantize()"),
    ],
)
def test_a_quantised_folder_is_refused_before_its_weights_are_read(
    folder: Path, kind: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantise(folder, kind)
    monkeypatch.setattr("kernel_server.models.weights.weight_files", unread)
    with pytest.raises(UnsupportedModel) as refused:
        open_model(str(folder), device="cpu")

    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.details["feature"] == "quantised weights"


def test_a_quantised_part_of_a_composite_model_is_found(folder: Path) -> None:
    quantise(folder, {"quant_method": "awq"}, part="text_config")
    with pytest.raises(UnsupportedModel, match="quantised"):
        open_model(str(folder), device="cpu")


def test_a_model_in_memory_with_packed_weights_is_refused() -> None:
    model = tiny.family("llama")
    packed = torch.zeros(4, 4, dtype=torch.int8)
    model.model.layers[1].mlp.packed = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(UnsupportedModel, match=r"layers.1.mlp.packed is int8"):
        resume(model)


@pytest.mark.parametrize("alone", [True, False])
def test_a_folder_with_an_adapter_is_refused_with_the_way_to_merge_it(
    folder: Path, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "someone/base", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({"lora_A": torch.zeros(8, 64)}, folder / "adapter_model.safetensors")
    if alone:
        (folder / "config.json").unlink()
        (folder / "model.safetensors").unlink()
    monkeypatch.setattr("kernel_server.models.weights.weight_files", unread)
    with pytest.raises(UnsupportedModel) as refused:
        open_model(str(folder), device="cpu")

    assert "LORA adapter of someone/base" in str(refused.value)
    assert "merge_and_unload()" in str(refused.value)
    assert refused.value.details["feature"] == "adapter"


def test_an_adapter_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(BrokenModel, match=r"adapter_config\.json"):
        open_model(str(folder), device="cpu")


class Adapted(nn.Module):
    """A linear map with a low-rank addition, as a LoRA adapter puts it in a linear's place."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        given: Tensor = self.base_layer(x)
        return given + self.lora_B(self.lora_A(x)) * 0.5


def test_adapters_inside_a_model_in_memory_are_served_as_part_of_it() -> None:
    plain, adapted = tiny.family("llama"), tiny.family("llama")
    torch.manual_seed(1)
    for layer in adapted.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        layer.self_attn.o_proj = Adapted(layer.self_attn.o_proj)
        layer.mlp.down_proj = Adapted(layer.mlp.down_proj)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        moved = (plain(ids).logits - adapted(ids).logits).abs().max()
    model, _, report = resume(adapted.eval())

    assert moved > 1e-3  # the adapters do something
    assert report.passed
    assert all(report.sites[site].off == {} for site in ("middle", "mlp.output", "attention.q"))
    assert model.model is adapted


def unread(*_: Any) -> Any:
    raise AssertionError("the weights were read")
