"""A stock model becomes one that is served, or the reason why not is said and nothing is kept."""

from __future__ import annotations

import json

import pytest
import torch

from kernel_server.engine.loading import serve
from kernel_server.protocol.errors import BadArgument
from tests.models import tiny

torch.set_num_threads(1)


def test_a_served_model_has_its_pool_and_its_report() -> None:
    served = serve(tiny.family("llama"), kv_memory_bytes=1 << 20, prefill_chunk=64)
    shape = served.cache.shape

    assert served.cache.num_pages == (1 << 20) // shape.page_bytes
    assert served.segments.prefill_chunk == 64
    assert served.report.as_dict()["passed"] is True
    assert json.loads(json.dumps(served.report.as_dict()))["checks"][0]["tolerance"] > 0


def test_page_length_and_depth_can_be_chosen() -> None:
    served = serve(tiny.family("gpt2"), kv_memory_bytes=1 << 20, page_tokens=8, group_layers=5)
    shape = served.cache.shape

    assert (shape.page_tokens, shape.group_layers, shape.num_groups) == (8, 5, 2)


def test_a_pool_too_small_for_one_session_is_refused_with_the_numbers() -> None:
    with pytest.raises(BadArgument, match=r"holds 1 pages of 16,384.* at least 2: give 32,768"):
        serve(tiny.family("llama"), kv_memory_bytes=20_000)


def test_a_prefill_chunk_of_no_tokens_is_refused() -> None:
    with pytest.raises(BadArgument, match="at least 1"):
        serve(tiny.family("llama"), kv_memory_bytes=1 << 20, prefill_chunk=0)


def test_a_cap_over_the_device_leaves_the_rest_for_pages():
    model = tiny.family("llama")
    weights = sum(p.nbytes for p in model.parameters())
    served = serve(model, device_memory_bytes=64 << 20, prefill_chunk=64)

    assert 0 < served.cache.pool.nbytes <= (64 << 20) - weights
    assert served.cache.pool.nbytes > 32 << 20
    assert served.tensor_bytes is not None and served.tensor_bytes < served.cache.page_bytes
    with pytest.raises(BadArgument, match=r"leaves -[\d,]+ after .* of weights, .* and 0 for"):
        serve(tiny.family("llama"), device_memory_bytes=weights - 1, prefill_chunk=64)


def test_a_cap_leaves_what_is_asked_for_tensors_of_stops_and_what_pages_do_not_take():
    cap, kept = 64 << 20, 8 << 20
    alone = serve(tiny.family("llama"), device_memory_bytes=cap, prefill_chunk=64)
    served = serve(
        tiny.family("llama"), device_memory_bytes=cap, kept_memory_bytes=kept, prefill_chunk=64
    )
    small = serve(
        tiny.family("llama"),
        device_memory_bytes=cap,
        kept_memory_bytes=kept,
        kv_memory_bytes=1 << 20,
        prefill_chunk=64,
    )

    assert served.tensor_bytes is not None and small.tensor_bytes is not None
    assert kept <= served.tensor_bytes < kept + served.cache.page_bytes
    # the workspace is measured anew each time
    assert abs(alone.cache.pool.nbytes - served.cache.pool.nbytes - kept) < 4 << 20
    assert small.tensor_bytes > 32 << 20, "a pool that is smaller leaves more"
    with pytest.raises(BadArgument, match="8,388,608 for tensors of stops"):
        serve(
            tiny.family("llama"), device_memory_bytes=kept, kept_memory_bytes=kept, prefill_chunk=64
        )
