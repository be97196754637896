"""The load check catches faults planted in the engine's path, and says where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from kernel_server.engine import attention
from kernel_server.engine.attention import Calibration, PagedAttentionRoute, PagedWork
from kernel_server.engine.kv_cache import KVCache
from kernel_server.engine.loading import CheckRunner, load_check, page_shape
from kernel_server.engine.segments import Segments
from kernel_server.models import selftest
from kernel_server.models.resumable import ResumableModel
from kernel_server.models.selftest import Trace, check_model
from kernel_server.protocol.errors import UnsupportedModel
from tests.models import tiny

torch.set_num_threads(1)

Patch = pytest.MonkeyPatch


def lost_norm(patch: Patch) -> None:
    """A replay that skips the final norm."""
    patch.setattr(ResumableModel, "norm", lambda self, hidden, *_: hidden)


def lost_mask(patch: Patch) -> None:
    patch.setattr(
        attention,
        "visible_mask",
        lambda begin, end, first, window, device: torch.ones(
            end - begin, end - first, dtype=torch.bool
        ),
    )


def shifted_layer(patch: Patch) -> None:
    """Layer 1 uses the pages of layer 0."""
    enter = PagedWork.enter
    patch.setattr(
        PagedWork, "enter", lambda self, layer, *rest: enter(self, max(layer - 1, 0), *rest)
    )


def shifted_positions(patch: Patch) -> None:
    """Decodes are fed one position late."""
    inputs = ResumableModel.inputs
    patch.setattr(
        ResumableModel, "inputs", lambda self, ids, start: inputs(self, ids, start + (start > 8))
    )


def zeroed_page(patch: Patch) -> None:
    read = KVCache.read

    def zeroed(self: KVCache, *args: Any) -> tuple[Tensor, Tensor]:
        key, value = (states.clone() for states in read(self, *args))
        for states in (key, value):
            states[:, :, : self.shape.page_tokens] = 0
        return key, value

    patch.setattr(KVCache, "read", zeroed)


def unwritten_slot(patch: Patch) -> None:
    """The first token of every chunk is not written: its slot still holds poison."""
    write = KVCache.write
    patch.setattr(
        KVCache, "write", lambda self, rows, states: write(self, rows[1:], states[:, :, 1:])
    )


def second_path(patch: Patch) -> None:
    """Replayed layers attend by another kernel than layers run in one pass."""
    layer = Segments._layer

    def other(self: Segments, state: Any, index: int, work: PagedWork) -> list[Tensor]:
        work.eager = True
        return layer(self, state, index, work)

    patch.setattr(Segments, "_layer", other)


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        (lost_norm, "against stock"),
        (lost_mask, "prefill against stock"),
        (shifted_layer, "against stock"),
        (shifted_positions, "decode against stock"),
        (zeroed_page, "against stock"),
        (unwritten_slot, "against stock"),
        (second_path, "stopped at every point"),
    ],
)
def test_a_planted_fault_is_caught_and_named(
    fault: Callable[[Patch], None], caught_by: str, monkeypatch: Patch
) -> None:
    model = ResumableModel(tiny.family("llama"), PagedAttentionRoute())
    shape = page_shape(model)
    assert load_check(model, shape).passed
    fault(monkeypatch)
    with pytest.raises(UnsupportedModel) as refused:
        load_check(model, shape)

    assert caught_by in str(refused.value)
    assert refused.value.details["report"]["passed"] is False


def test_a_lost_sliding_window_is_caught(monkeypatch: Patch) -> None:
    model = ResumableModel(tiny.family("mistral"), PagedAttentionRoute())
    attend = PagedWork.attend

    def unbounded(self: PagedWork, m: Any, q: Tensor, k: Tensor, v: Tensor, x: Any, o: Any) -> Any:
        return attend(self, m, q, k, v, x, {**o, "sliding_window": None})

    monkeypatch.setattr(PagedWork, "attend", unbounded)
    with pytest.raises(UnsupportedModel, match="against stock"):
        load_check(model, page_shape(model))


def test_a_lost_soft_cap_is_caught(monkeypatch: Patch) -> None:
    kind, fields = tiny.REQUIRED["gemma2"]
    stock = tiny.build(kind, {**fields, "attn_logit_softcapping": 0.1})
    model = ResumableModel(stock, PagedAttentionRoute())
    eager = attention._eager

    def uncapped(*args: Any) -> Tensor:
        return eager(*args[:-1], {**args[-1], "softcap": None})

    monkeypatch.setattr(attention, "_eager", uncapped)
    with pytest.raises(UnsupportedModel, match="against stock"):
        load_check(model, page_shape(model))


def test_a_layer_that_writes_into_its_input_is_refused() -> None:
    stock = tiny.family("llama")
    layer = stock.model.layers[2]
    forward = layer.forward

    def in_place(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = forward(hidden, *args, **kwargs)
        hidden.add_(1.0)
        return output

    layer.forward = in_place
    with pytest.raises(UnsupportedModel, match="layer 2 changes its input in place"):
        ResumableModel(stock, PagedAttentionRoute())


def test_a_layer_with_a_mood_is_refused(monkeypatch: Patch) -> None:
    """Not the same twice for the same input: no replay could be exact."""
    forward, calls = LlamaMLP.forward, []

    def moody(self: LlamaMLP, x: Tensor) -> Tensor:
        calls.append(1)
        return forward(self, x) * (1 + 1e-6 * len(calls))

    monkeypatch.setattr(LlamaMLP, "forward", moody)
    model = ResumableModel(tiny.family("llama"), PagedAttentionRoute())
    with pytest.raises(UnsupportedModel, match="load check"):
        load_check(model, page_shape(model))


def test_a_gpu_that_does_not_repeat_itself_is_told_apart_from_a_wrong_model(
    monkeypatch: Patch,
) -> None:
    model = ResumableModel(tiny.family("llama"), PagedAttentionRoute())
    seen: Calibration = model.observer
    runner, runs = CheckRunner(model, page_shape(model)), []
    run = runner.run

    def drifting(*args: Any, **kwargs: Any) -> list[Trace]:
        traces = run(*args, **kwargs)
        runs.append(traces)
        if len(runs) == 7:  # one of the repetitions
            traces[2].logits = traces[2].logits.nextafter(torch.tensor(torch.inf))
        return traces

    monkeypatch.setattr(runner, "run", drifting)
    # Only the question which device it is: the tensors stay where they are.
    monkeypatch.setattr(selftest, "_may_drift", lambda device: True)
    with pytest.raises(UnsupportedModel, match=r"logits of forward .* same bits twice"):
        check_model(model, runner, list(seen.windows.values()))
