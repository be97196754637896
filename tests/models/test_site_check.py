"""The load check of the sites catches what is planted, switches off those sites and says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from kernel_server.engine import attention, cache_route
from kernel_server.engine.attention import PagedAttentionRoute
from kernel_server.engine.loading import load_check, page_shape, resume
from kernel_server.models import sites as sites_module
from kernel_server.models.resumable import ResumableModel
from kernel_server.models.selftest import LoadReport
from kernel_server.models.sites import LayerSites, Visit
from kernel_server.protocol.location import INNER_SITES
from tests.models import tiny

torch.set_num_threads(1)

Patch = pytest.MonkeyPatch
ADDED = ("attention.output", "middle", "mlp.output")


def resumable(name: str) -> ResumableModel:
    return ResumableModel(tiny.family(name), PagedAttentionRoute())


def checked(model: ResumableModel) -> LoadReport:
    return load_check(model, page_shape(model))


def reasons(report: LoadReport, site: str) -> str:
    return " | ".join(report.sites[site].off)


def failed(report: LoadReport) -> set[str]:
    return {check.name for check in report.site_checks if not check.passed}


def test_a_model_that_is_in_order_keeps_every_site_and_says_what_was_checked() -> None:
    report = checked(resumable("llama"))

    assert failed(report) == set()
    assert {str(support) for support in report.sites.values()} == {"all layers"}
    assert {check.name for check in report.site_checks} == {
        "looking changes nothing",
        "sum rule",
        "identity edits",
        "identity edit of the pattern",
        "edits arrive",
        "attention.k against stock",
        "attention.v against stock",
        "weights sum to one",
        "weights give the heads",
        "weights against stock",
        "parts are whose they are",
    }


def test_the_report_names_layers_and_reasons_in_plain_values() -> None:
    report = checked(resumable("deepseek_v3")).as_dict()
    neurons = report["sites"]["mlp.neurons"]

    assert list(report["sites"]) == list(INNER_SITES)
    assert neurons["layers"] == [0, 1]
    assert [entry["layers"] for entry in neurons["off"]] == [[2, 3, 4, 5]]
    assert "mixture of experts" in neurons["off"][0]["reason"]
    assert all(set(check) >= {"name", "value", "passed"} for check in report["site_checks"])


# -- planted faults --------------------------------------------------------------------------------


def test_a_norm_taken_for_no_norm_fails_the_sum_rule() -> None:
    """Gemma-2 norms what attention gives before it is added; the value before that is wrong."""
    model = resumable("gemma2")
    for sites in model.sites:
        assert sites.output_projection is not None
        sites.attention_weight = sites.output_projection.weight
    report = checked(model)

    assert "sum rule" in failed(report)
    assert all("sum rule" in reasons(report, site) for site in ADDED)
    assert report.passed
    assert str(report.sites["attention.heads"]) == "all layers"


def test_the_mlp_s_norm_left_out_fails_the_sum_rule(monkeypatch: Patch) -> None:
    """A rule that adds in another order than the family, or another vector, does not sum."""
    total = sites_module.Additions.total
    monkeypatch.setattr(
        sites_module.Additions, "total", lambda self, x, a, m: total(self, x, a, m / m.norm())
    )
    report = checked(resumable("olmo2"))

    assert all("sum rule" in reasons(report, site) for site in ADDED)


def test_a_mask_lost_from_the_pattern_is_caught(monkeypatch: Patch) -> None:
    weights = attention.attention_weights

    def unmasked(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: Any) -> Tensor:
        return weights(module, q, k, v, None, options)

    monkeypatch.setattr(attention, "attention_weights", unmasked)
    report = checked(resumable("llama"))

    assert "identity edit of the pattern" in failed(report)
    assert report.sites["attention.pattern"].layers == []
    assert str(report.sites["attention.heads"]) == "all layers"


def test_weights_shown_for_another_head_are_caught(monkeypatch: Patch) -> None:
    """Put back they are in order again; but they do not give the heads."""
    spread, window_of = attention.spread, attention.window_of
    monkeypatch.setattr(attention, "spread", lambda w, *rest: spread(w.flip(1), *rest))
    monkeypatch.setattr(attention, "window_of", lambda *args: window_of(*args).flip(1))
    report = checked(resumable("llama"))

    assert {"weights give the heads", "weights against stock"} <= failed(report)
    assert report.sites["attention.pattern"].layers == []


def test_a_window_lost_from_the_pattern_is_caught(monkeypatch: Patch) -> None:
    """Only the layers with a sliding window lose their weights."""
    weights = attention.attention_weights

    def unbounded(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: Any) -> Tensor:
        if options.get("sliding_window") and mask is not None:
            ends = mask.shape[1] - mask.shape[0]
            mask = torch.ones_like(mask).tril(ends)
        return weights(module, q, k, v, mask, options)

    monkeypatch.setattr(attention, "attention_weights", unbounded)
    report = checked(resumable("gemma2"))

    assert report.sites["attention.pattern"].layers == [1, 3, 5]


def test_a_lost_soft_cap_of_the_pattern_is_caught(monkeypatch: Patch) -> None:
    kind, fields = tiny.REQUIRED["gemma2"]
    stock = tiny.build(kind, {**fields, "attn_logit_softcapping": 0.1})
    weights = attention.attention_weights
    monkeypatch.setattr(
        attention,
        "attention_weights",
        lambda *args: weights(*args[:-1], {**args[-1], "softcap": None}),
    )
    report = checked(ResumableModel(stock, PagedAttentionRoute()))

    assert report.sites["attention.pattern"].layers == []


def test_keys_of_another_layer_are_caught_on_the_cache_route(monkeypatch: Patch) -> None:
    """The keys that the visit is offered are not those that the pages and stock hold."""
    offer = cache_route.offer_kept

    def shifted(visit: Visit, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        offer(visit, key.roll(1, 2), value)
        return key, value

    monkeypatch.setattr(cache_route, "offer_kept", shifted)
    fields = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 97, "n_positions": 256}
    _, _, report = resume(tiny.build("gptj", {**fields, "rotary_dim": 8}))

    assert report.sites["attention.k"].layers == []
    assert report.sites["attention.v"].layers == [0, 1, 2]


class InPlace(LlamaDecoderLayer):
    """Adds the MLP's part into the residual stream itself, where the middle lies."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        residual = hidden_states
        hidden_states, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        middle = residual + hidden_states
        middle += self.mlp(self.post_attention_layernorm(middle))
        return middle


def in_place() -> ResumableModel:
    stock = tiny.family("llama")
    for layer in stock.model.layers:
        layer.__class__ = InPlace
    return ResumableModel(stock, PagedAttentionRoute())


def test_an_addition_in_place_is_followed() -> None:
    report = checked(in_place())

    assert failed(report) == set()
    assert all(str(report.sites[site]) == "all layers" for site in ADDED)


def test_a_value_kept_where_the_layer_goes_on_to_add_in_place_is_caught(
    monkeypatch: Patch,
) -> None:
    def keep(self: Visit, site: str, value: Tensor) -> Tensor | None:
        self.taken[site] = value  # no copy
        return self.injected.get(site)

    monkeypatch.setattr(Visit, "at", keep)
    report = checked(in_place())

    assert "sum rule" in failed(report)
    assert report.sites["middle"].layers == []


def test_an_addition_in_place_that_is_not_known_costs_the_sites_not_the_model(
    monkeypatch: Patch,
) -> None:
    monkeypatch.setattr(sites_module, "ADDITIONS", sites_module.ADDITIONS - {torch.Tensor.add_})
    report = checked(in_place())

    assert report.passed
    assert all(report.sites[site].layers == [] for site in ADDED)
    assert str(report.sites["attention.q"]) == "all layers"


def shifted(model: ResumableModel, **fields: Any) -> None:
    """Every layer is given what was learnt of the layer before it."""
    before = [dataclasses.replace(sites) for sites in model.sites]
    for index, sites in enumerate(model.sites):
        for name in fields:
            setattr(sites, name, getattr(before[index - 1], name))


def test_the_neurons_of_another_layer_are_never_met() -> None:
    model = resumable("llama")
    shifted(model, down_projection=True)
    report = checked(model)

    assert reasons(report, "mlp.neurons") == "the layer never comes to it"
    assert str(report.sites["mlp.output"]) == "all layers"


def test_attention_s_part_of_another_layer_is_never_met() -> None:
    model = resumable("phi")
    shifted(model, attention_weight=True)
    report = checked(model)

    assert report.sites["attention.output"].layers == []


def test_values_of_another_layer_in_the_pages_are_caught(monkeypatch: Patch) -> None:
    """Stock's own cache says which keys are whose."""
    from kernel_server.models import selftest

    kept = selftest._kept

    def shifted_by_one(cache: Any, layers: int) -> Any:
        keys, values = kept(cache, layers)
        return keys[1:] + keys[:1], values[1:] + values[:1]

    monkeypatch.setattr(selftest, "_kept", shifted_by_one)
    report = checked(resumable("llama"))

    assert report.sites["attention.k"].layers == []
    assert "differs from stock's cache" in reasons(report, "attention.v")


def swapped(sites: LayerSites) -> None:
    assert sites.additions is not None
    sites.additions = dataclasses.replace(
        sites.additions, attention_operand=1 - sites.additions.attention_operand
    )


def late(sites: LayerSites) -> None:
    assert sites.additions is not None
    sites.additions = dataclasses.replace(sites.additions, joined_at=1)


@pytest.mark.parametrize("fault", [swapped, late])
def test_an_addition_taken_for_another_is_caught(fault: Callable[[LayerSites], None]) -> None:
    """In GPT-NeoX attention's part and the MLP's are joined before they are added."""
    model = resumable("gpt_neox")
    for sites in model.sites:
        sites.attention_weight = None
        fault(sites)
    report = checked(model)

    assert report.passed
    assert report.sites["mlp.output"].layers == []
    assert report.sites["attention.output"].layers == []


def test_an_edit_that_does_not_arrive_is_caught(monkeypatch: Patch) -> None:
    """A visit that offers heads and leaves them as they were."""
    heads = Visit.heads

    def deaf(self: Visit, site: str, states: Tensor) -> Tensor:
        heads(self, site, states.clone())
        return states

    monkeypatch.setattr(Visit, "heads", deaf)
    report = checked(resumable("llama"))

    for site in ("attention.q", "attention.k", "attention.v", "attention.heads"):
        assert reasons(report, site) == "an edit there changes nothing: it is not on the path"


def test_a_mode_that_changes_the_layer_is_caught(monkeypatch: Patch) -> None:
    """Looking must not change the path."""
    vectors = Visit.vectors
    monkeypatch.setattr(Visit, "vectors", lambda self, s, t: vectors(self, s, t) * (1 + 1e-6))
    report = checked(resumable("llama"))

    assert "looking changes nothing" in failed(report)
    assert all(report.sites[site].layers == [] for site in ADDED)


def test_a_check_that_breaks_costs_the_sites_of_its_layer(monkeypatch: Patch) -> None:
    vectors = Visit.vectors

    def breaking(self: Visit, site: str, tensor: Tensor) -> Tensor:
        if site == "mlp.neurons" and tensor.shape[1] == 1:
            raise IndexError("planted")
        return vectors(self, site, tensor)

    monkeypatch.setattr(Visit, "vectors", breaking)
    report = checked(resumable("llama"))

    assert report.passed
    assert "IndexError: planted" in reasons(report, "mlp.neurons")


def test_weights_that_stock_does_not_give_are_noted(monkeypatch: Patch) -> None:
    from kernel_server.models import selftest

    monkeypatch.setattr(selftest, "_run_eager", lambda *_: None)
    report = checked(resumable("llama"))

    assert "no weights here" in report.notes[0]
    assert str(report.sites["attention.pattern"]) == "all layers"


def test_a_value_put_back_elsewhere_is_caught(monkeypatch: Patch) -> None:
    """An injection that rounds: the layer's bits change though nothing was edited."""
    monkeypatch.setattr(sites_module, "_overwrite", lambda t, put: t.copy_(put * (1 + 1e-6)))
    report = checked(resumable("llama"))

    assert "identity edits" in failed(report)
    assert all(
        "put back unchanged" in reasons(report, site)
        for site in INNER_SITES
        if site != "attention.pattern"
    )
