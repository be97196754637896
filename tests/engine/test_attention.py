"""Attention over pages equals attention over everything, chunk by chunk and token by token."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kernel_server.engine.attention import (
    Calibration,
    PagedAttentionRoute,
    PagedWork,
    visible_mask,
    working,
)
from kernel_server.engine.kv_cache import KVCache, LayerKV, PageShape
from kernel_server.protocol.errors import ServerFault, UnsupportedModel

torch.set_num_threads(1)

TOKENS = 23


def reference(query, key, value, window):
    """Plain masked softmax in float64."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query.double() @ key.double().transpose(2, 3) / query.shape[-1] ** 0.5
    places = torch.arange(TOKENS)
    seen = places[None] <= places[:, None]
    if window is not None:
        seen &= places[:, None] - places[None] < window
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value.double()).transpose(1, 2).float()


@pytest.mark.parametrize("window", [None, 1, 5, 8, 40])
@pytest.mark.parametrize("value_dim", [16, 8])
@pytest.mark.parametrize("chunk", [1, 4, 9, TOKENS])
def test_chunks_over_pages_equal_one_attention_over_all(
    chunk: int, value_dim: int, window: int | None
) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, TOKENS, 16)
    key, value = torch.randn(1, 2, TOKENS, 16), torch.randn(1, 2, TOKENS, value_dim)
    cache = KVCache(PageShape(4, 2, (LayerKV(2, 16, 2, value_dim),) * 3, torch.float32), 14, "cpu")
    cache.poison(range(14))
    work = PagedWork(cache, [[9, 1, 8, 0, 3, 2], [4, 5, 6, 7, 10, 11]], eager=False)
    outputs = []
    for begin in range(0, TOKENS, chunk):
        end = min(begin + chunk, TOKENS)
        work.enter(2, begin, end)
        outputs.append(
            work.attend(
                nn.Module(),
                query[:, :, begin:end],
                key[:, :, begin:end],
                value[:, :, begin:end],
                None,
                {"sliding_window": window},
            )
        )
        work.leave()

    torch.testing.assert_close(
        torch.cat(outputs, 1), reference(query, key, value, window), atol=2e-6, rtol=1e-5
    )


def test_a_window_reads_only_the_pages_it_needs() -> None:
    cache = KVCache(PageShape(4, 1, (LayerKV(1, 8, 1, 8),), torch.float32), 6, "cpu")
    work = PagedWork(cache, [[0, 1, 2, 3, 4, 5]], eager=False)
    states = torch.randn(1, 1, 20, 8)
    work.enter(0, 0, 20)
    work.attend(nn.Module(), states, states, states, None, {})
    cache.poison([0, 1, 2])  # tokens 0 … 11
    one = states[:, :, :1]
    work.enter(0, 20, 21)

    assert work.attend(nn.Module(), one, one, one, None, {"sliding_window": 9}).isfinite().all()
    work.enter(0, 20, 21)
    assert work.attend(nn.Module(), one, one, one, None, {"sliding_window": 10}).isnan().any()


def test_the_mask_is_aligned_at_the_bottom_right() -> None:
    mask = visible_mask(3, 5, 1, None, torch.device("cpu"))
    narrow = visible_mask(3, 5, 1, 2, torch.device("cpu"))

    assert mask.tolist() == [[True, True, True, False], [True, True, True, True]]
    assert narrow.tolist() == [[False, True, True, False], [False, False, True, True]]


def small_work() -> PagedWork:
    cache = KVCache(PageShape(4, 1, (LayerKV(1, 8, 1, 8),), torch.float32), 2, "cpu")
    return PagedWork(cache, [[0, 1]], eager=False)


def test_calls_the_load_check_did_not_see_are_faults() -> None:
    states = torch.randn(1, 1, 2, 8)
    work = small_work()
    work.enter(0, 0, 2)
    with pytest.raises(ServerFault, match="called attention 0 times"):
        work.leave()
    with pytest.raises(ServerFault, match="mask True"):
        work.attend(nn.Module(), states, states, states, torch.ones(2, 2), {})
    work.enter(0, 0, 3)
    with pytest.raises(ServerFault, match="2 of 3 tokens"):
        work.attend(nn.Module(), states, states, states, None, {})
    work.enter(0, 0, 2)
    work.attend(nn.Module(), states, states, states, None, {})
    with pytest.raises(ServerFault, match="call 2"):
        work.attend(nn.Module(), states, states, states, None, {})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"position_bias": torch.ones(1)}, "'position_bias'"),
        ({"is_causal": False}, "not causal"),
        ({"dropout": 0.1}, "at random"),
        ({"softcap": 30.0}, "caps its scores"),
        ({"s_aux": torch.ones(1)}, "no eager attention"),
    ],
)
def test_what_is_not_known_of_attention_is_refused(options: dict, words: str) -> None:
    states = torch.randn(1, 1, 2, 8)
    work = Calibration("family", eager=False)
    work.enter(0)
    with pytest.raises(UnsupportedModel, match=words):
        work.attend(nn.Module(), states, states, states, None, options)


def test_work_ends_with_its_context() -> None:
    function = PagedAttentionRoute()
    work = Calibration("family", eager=False)
    with pytest.raises(RuntimeError), working(work):
        raise RuntimeError

    from kernel_server.engine.attention import _WORK

    assert _WORK.get() is None
    assert function.name == "djinn_pages"
