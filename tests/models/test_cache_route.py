"""The Cache route: exact where the attention function is not heard, and caught when it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_server.engine import segments
from kernel_server.engine.cache_route import MASK_BYTES, CacheRoute, CacheWork, longest_prompt
from kernel_server.engine.kv_cache import KVCache
from kernel_server.engine.loading import load_check, page_shape, resume, serve
from kernel_server.engine.segments import Segments
from kernel_server.models.recording import Call, CallAxes, Recording, cut_call
from kernel_server.models.registry import max_context
from kernel_server.models.resumable import ResumableModel
from kernel_server.protocol.errors import ServerFault, UnsupportedModel
from tests.engine.bookkeeper import walk
from tests.models import tiny, zoo

torch.set_num_threads(1)

Patch = pytest.MonkeyPatch
#: Families that the attention function never reaches, or reaches wrongly, and what they have.
FIRST = (
    "bloom",  # biases by distance instead of positions
    "falcon (alibi)",  # biases within the mask
    "falcon (multi-query)",
    "gpt_neo",  # masks cut to the keys inside attention
    "gptj",
    "mpt",
)
OTHERS = (
    "codegen",
    "diffllama",  # two attentions in a layer
    "doge",  # a mask of its own
    "falcon (new decoder)",
    "llama4_text",  # attention in chunks of the context
    "roberta",  # positions counted behind the padding
    "xglm",
)
FAMILIES = (*FIRST, *OTHERS)


def mostly_slow(first: Sequence[str], others: Sequence[str]) -> list[Any]:
    """Parameters of which `others` wait for the long run."""
    return [*first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


def on_cache(name: str, dtype: torch.dtype = torch.float32) -> ResumableModel:
    return ResumableModel(zoo.model(name).to(dtype), CacheRoute())


@pytest.mark.parametrize("name", mostly_slow(FIRST, OTHERS))
def test_a_family_outside_the_attention_interface_is_exact(name: str) -> None:
    model, _, report = resume(zoo.model(name))

    assert report.passed
    assert {check.name for check in report.checks} >= {
        "prefill against stock",
        "decode against stock",
        "stopped at every point",
        "one pass and replay",
    }
    assert report.attention.startswith("Cache, ")
    assert model.cache is not None


@pytest.mark.parametrize("name", mostly_slow(["bloom"], ["falcon (new decoder)", "gptj", "mpt"]))
def test_it_is_exact_in_low_precision_too(name: str) -> None:
    model, _, report = resume(zoo.model(name).to(torch.bfloat16))

    assert report.passed
    assert report.dtype == "bfloat16"
    assert model.cache is not None


@pytest.mark.parametrize(
    "name", mostly_slow(["gemma2"], ["llama", "mistral", "gpt2", "mixtral", "deepseek_v3"])
)
def test_families_of_the_other_route_are_exact_on_this_one(name: str) -> None:
    model = ResumableModel(tiny.family(name), CacheRoute())

    assert load_check(model, page_shape(model)).passed


@pytest.mark.parametrize("name", mostly_slow(["mpt"], ["bloom", "falcon (alibi)", "gpt_neo"]))
def test_stops_forks_moves_and_company_change_no_bit(name: str) -> None:
    _, different = walk(resume(zoo.model(name))[0], range(0, tiny.LAYERS + 3, 2), 6, 21, 3)

    assert different == []


def test_the_attention_function_comes_first_and_the_choice_is_reported() -> None:
    llama, _, first = resume(tiny.family("llama"))
    bloom, _, second = resume(zoo.model("bloom"))

    assert (llama.route.name, first.attention) == ("djinn_pages", "function, stock sdpa")
    assert (bloom.route.name, second.attention) == ("djinn_cache_eager", "Cache, stock eager")


def test_what_neither_route_runs_is_refused_with_both_reasons_and_left_as_it_came() -> None:
    stock = zoo.model("xlnet")
    before = stock.config._attn_implementation
    with pytest.raises(UnsupportedModel) as refused:
        resume(stock)
    message = str(refused.value)

    assert message.startswith("xlnet: its attention cannot be routed")
    assert "; and by the Cache route: its residual stream has shape" in message
    assert "\n" not in message
    assert refused.value.details["feature"] == "attention interface"
    assert refused.value.details["cache_route"]["feature"] == "residual stream"
    assert stock.config._attn_implementation == before


def test_a_reason_that_no_route_changes_is_given_once() -> None:
    with pytest.raises(UnsupportedModel) as refused:
        resume(zoo.model("mamba"))

    assert "recurrent state" in str(refused.value)
    assert "Cache route" not in str(refused.value)


def test_what_the_model_itself_raises_in_the_check_is_a_refusal(monkeypatch: Patch) -> None:
    def broken(self: Segments, *_: Any) -> Tensor:
        raise IndexError("out of range")

    monkeypatch.setattr(Segments, "_norm", broken)
    with pytest.raises(UnsupportedModel, match="the load check ended in IndexError: out of range"):
        resume(tiny.family("llama"))


# -- what bounds a prompt --------------------------------------------------------------------------


def test_masks_bound_the_prompt_and_a_model_without_them_is_not_bound() -> None:
    bloom, alibi = serve(zoo.model("bloom")), serve(zoo.model("falcon (alibi)"))
    llama = serve(tiny.family("llama"))

    assert llama.max_prompt is None
    # one float32 mask for all layers; with ALiBi one for each head
    assert bloom.max_prompt == longest_prompt(4.0) == int((MASK_BYTES / 4) ** 0.5)
    assert alibi.max_prompt == longest_prompt(4.0 * tiny.HEADS)


def test_positions_counted_behind_the_padding_leave_less_context() -> None:
    roberta = zoo.model("roberta")

    assert roberta.config.max_position_embeddings == 256
    assert max_context(roberta) == 255
    assert max_context(zoo.model("mpt")) == 256


# -- what a chunk sees -----------------------------------------------------------------------------


def test_a_chunk_is_given_the_keys_up_to_its_end_and_a_mask_as_wide(monkeypatch: Patch) -> None:
    model, seen = on_cache("gptj"), []
    update, cut = CacheWork.update, cut_call

    def noted(self: CacheWork, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        given = update(self, layer, key, value)
        seen.append((key.shape[2], given[0].shape[2], given[1].shape[2]))
        return given

    def measured(*args: Any, **kwargs: Any) -> Call:
        call = cut(*args, **kwargs)
        seen.append(tuple(call.keywords["attention_mask"].shape[2:]))
        return call

    monkeypatch.setattr(CacheWork, "update", noted)
    monkeypatch.setattr(segments, "cut_call", measured)
    run(model, [list(range(5, 25)), [7]], chunk=8)
    chunks = [(8, 8), (8, 8, 8), (8, 16), (8, 16, 16), (4, 20), (4, 20, 20)]

    assert seen == chunks * model.num_layers + [(1, 21, 21)] * model.num_layers


def test_large_masks_do_not_stay_with_a_session_that_stands_still(monkeypatch: Patch) -> None:
    """Sixty-four stopped sessions with a mask of a long prompt each would fill a device."""
    model = on_cache("bloom")
    shape = page_shape(model)
    at = Segments(model, KVCache(shape, 16, "cpu"), prefill_chunk=8)
    tables = [list(range(g, 16, shape.num_groups)) for g in range(shape.num_groups)]
    logits = []
    for kept in (segments.KEPT_MASK_BYTES, 20 * 20 * 4 - 1):
        monkeypatch.setattr(segments, "KEPT_MASK_BYTES", kept)
        state = at.begin(range(5, 25), 0)
        at.advance(state, 3, tables, lambda point, state: point == 3)
        held = state.recording
        at.advance(state, model.num_layers + 2, tables, lambda point, state: False)
        logits.append(at.logits(state))

        assert (held is None) == (kept < 20 * 20 * 4)

    assert torch.equal(*logits)


def test_reading_the_lens_on_the_way_changes_nothing() -> None:
    """A lens runs a preamble of its own, of another length, inside the forward's."""
    model = on_cache("mpt")
    plain = run(model, [list(range(5, 11)), [7], [8]], chunk=8)

    def look(_: float, state: Any, at: Segments) -> None:
        if 0 <= state.point <= model.num_layers:
            at.lens(at.value(state)[0][0])

    assert all(map(torch.equal, plain, run(model, [list(range(5, 11)), [7], [8]], 8, look)))


def test_a_model_on_pages_called_from_elsewhere_is_a_fault() -> None:
    model = on_cache("bloom")
    with pytest.raises(ServerFault, match="outside the engine"):
        model.model(torch.tensor([[5, 6]]), past_key_values=model.cache)


def test_a_layer_that_uses_another_s_keys_is_refused() -> None:
    stock = zoo.model("bloom")
    stock.transformer.h[2].self_attention.layer_idx = 1
    with pytest.raises(UnsupportedModel, match="layer 2 updates the keys and values of layers"):
        ResumableModel(stock, CacheRoute())


def run(
    model: ResumableModel,
    forwards: list[list[int]],
    chunk: int,
    look: Callable[[float, Any, Segments], None] | None = None,
) -> list[Tensor]:
    """Logits of each forward of one session."""
    shape = page_shape(model)
    at = Segments(model, KVCache(shape, 16, "cpu"), prefill_chunk=chunk)
    tables = [list(range(g, 16, shape.num_groups)) for g in range(shape.num_groups)]
    logits, start = [], 0
    for tokens in forwards:
        state = at.begin(tokens, start)

        def on_point(point: float, state: Any) -> bool:
            if look is not None:
                look(point, state, at)
            return False

        at.advance(state, model.num_layers + 2, tables, on_point)
        logits.append(at.logits(state))
        start += len(tokens)
    return logits


# -- controls: faults planted in the engine's path alone -------------------------------------------


def with_masks(patch: Patch, change: Callable[[Tensor, int], Tensor]) -> None:
    """Change the masks of chunks; the second argument is the chunk's first token."""

    def cut(recording: Recording, index: int, axes: CallAxes, begin: int, *rest: int, **k: int):
        call = cut_call(recording, index, axes, begin, *rest, **k)
        mask = change(call.keywords["attention_mask"], begin)
        return Call(call.rest, {**call.keywords, "attention_mask": mask}, call.by_name)

    patch.setattr(segments, "cut_call", cut)


def lost_mask(patch: Patch) -> None:
    with_masks(patch, lambda mask, _: torch.zeros_like(mask))


def mask_a_token_late(patch: Patch) -> None:
    with_masks(patch, lambda mask, _: mask.roll(1, dims=2))


def pages_off_by_one(patch: Patch) -> None:
    """Reads begin at the session's second page."""
    rows = KVCache.layer_rows
    patch.setattr(KVCache, "layer_rows", lambda self, t: rows(self, [*t[1:], *t[:1]]))


def unbounded_window(patch: Patch) -> None:
    """Every earlier token is seen, however far away."""

    def causal(mask: Tensor, begin: int) -> Tensor:
        queries, keys = mask.shape[2:]
        later = torch.arange(keys)[None] > torch.arange(begin, begin + queries)[:, None]
        return torch.zeros_like(mask).masked_fill_(later, torch.finfo(mask.dtype).min)

    with_masks(patch, causal)


@pytest.mark.parametrize("name", mostly_slow(["bloom"], ["gptj", "falcon (new decoder)"]))
@pytest.mark.parametrize("fault", [lost_mask, mask_a_token_late, pages_off_by_one])
def test_a_planted_fault_is_caught(
    fault: Callable[[Patch], None], name: str, monkeypatch: Patch
) -> None:
    model = on_cache(name)
    shape = page_shape(model)
    assert load_check(model, shape).passed
    fault(monkeypatch)
    with pytest.raises(UnsupportedModel, match="'prefill against stock'"):
        load_check(model, shape)


@pytest.mark.parametrize(("width", "caught_by"), [(8, "stock'"), (4096, r"stock \(window 6\)'")])
def test_an_ignored_sliding_window_is_caught_however_wide(
    width: int, caught_by: str, monkeypatch: Patch
) -> None:
    stock = tiny.build("mistral", {**tiny.LLAMA, "sliding_window": width})
    model = ResumableModel(stock, CacheRoute())
    shape = page_shape(model)
    assert load_check(model, shape).passed
    unbounded_window(monkeypatch)
    with pytest.raises(UnsupportedModel, match=f"'prefill against {caught_by}"):
        load_check(model, shape)

    assert stock.config.sliding_window == width
