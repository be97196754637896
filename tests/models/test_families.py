"""Which families the attention function serves, and that a refusal says why."""

from __future__ import annotations

import pytest
import torch

from kernel_server.engine.attention import PagedAttentionRoute
from kernel_server.engine.loading import load_check, page_shape
from kernel_server.models.anatomy import configs_of, find_layers
from kernel_server.models.resumable import ResumableModel, _require_fixed_workspaces
from kernel_server.models.selftest import LoadReport
from kernel_server.protocol.errors import BadArgument, UnsupportedModel
from tests.models import tiny

torch.set_num_threads(1)


def check(name: str, dtype: torch.dtype) -> LoadReport:
    model = ResumableModel(tiny.family(name, dtype), PagedAttentionRoute())
    return load_check(model, page_shape(model))


FP32 = [(name, torch.float32) for name in [*tiny.REQUIRED, *tiny.OTHERS]]
BF16 = [(name, torch.bfloat16) for name in [*tiny.REQUIRED, "gpt_oss", "deepseek_v3", "olmo2"]]


@pytest.mark.parametrize(("name", "dtype"), [*FP32, *BF16], ids=str)
def test_a_family_passes_the_load_check(name: str, dtype: torch.dtype) -> None:
    report = check(name, dtype)

    assert report.passed
    assert {c.name for c in report.checks} >= {
        "prefill against stock",
        "decode against stock",
        "stopped at every point",
        "one pass and replay",
    }


@pytest.mark.parametrize("name", tiny.REFUSED)
def test_a_family_that_cannot_be_exact_so_is_refused_with_the_reason(name: str) -> None:
    kind, fields, words = tiny.REFUSED[name]
    stock = tiny.build(kind, fields)
    before = [config._attn_implementation for config in configs_of(stock)]
    with pytest.raises(UnsupportedModel) as refused:
        model = ResumableModel(stock, PagedAttentionRoute())
        load_check(model, page_shape(model))
    message = str(refused.value)

    assert message.startswith(f"{kind}: ")
    assert words in message
    assert "\n" not in message
    assert refused.value.details["feature"]
    if name != "llama4":  # refused before anything was set, or set back
        assert [config._attn_implementation for config in configs_of(stock)] == before


def test_sliding_windows_are_checked_beyond_their_edge() -> None:
    report = check("mistral", torch.float32)
    names = [c.name for c in report.checks]

    assert any("window" in name for name in names)


def test_soft_caps_are_kept_where_stock_would_choose_an_attention_without_them() -> None:
    stock = tiny.family("gemma2")
    stock.config._attn_implementation_internal = "sdpa"
    model = ResumableModel(stock, PagedAttentionRoute())

    assert (model.eager, model.stock_attention) == (True, "eager")
    assert load_check(model, page_shape(model)).passed


def test_experts_in_low_precision_are_compared_on_the_engine_s_inputs_and_say_so() -> None:
    report = check("mixtral", torch.bfloat16)

    assert "mixture of experts" in report.notes[0]
    assert check("mixtral", torch.float32).notes == []


def test_the_stock_twin_keeps_its_own_attention_and_shares_the_weights() -> None:
    stock = tiny.family("gemma2")
    model = ResumableModel(stock, PagedAttentionRoute())
    twin = model.stock()
    ids = torch.tensor([model.sample_ids(12)])
    with torch.no_grad():
        eager = tiny.family("gemma2")
        eager.set_attn_implementation("eager")
        expected = eager(ids).logits
        found = twin(ids).logits

    assert torch.equal(found, expected)
    assert twin.config._attn_implementation == "eager"
    assert stock.config._attn_implementation == model.route.name
    assert all(a is b for a, b in zip(twin.parameters(), stock.parameters(), strict=True))


def test_the_stock_module_tree_is_left_as_it_was() -> None:
    stock = tiny.family("opt")
    before = [(name, id(module), type(module)) for name, module in stock.named_modules()]
    hooks = [len(module._forward_hooks) for module in stock.modules()]
    model = ResumableModel(stock, PagedAttentionRoute())
    load_check(model, page_shape(model))

    assert [(n, id(m), type(m)) for n, m in stock.named_modules()] == before
    assert [len(module._forward_hooks) for module in stock.modules()] == hooks


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("llama", "model.layers"),
        ("gpt2", "transformer.h"),
        ("opt", "model.decoder.layers"),
        ("gpt_neox", "gpt_neox.layers"),
    ],
)
def test_the_layer_list_is_found_where_the_family_keeps_it(name: str, path: str) -> None:
    assert find_layers(tiny.family(name)).layers_path == path


def test_a_gpu_with_workspaces_of_any_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _require_fixed_workspaces(torch.device("cuda"))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    _require_fixed_workspaces(torch.device("cpu"))
    with pytest.raises(BadArgument, match="same bits twice"):
        _require_fixed_workspaces(torch.device("cuda"))
