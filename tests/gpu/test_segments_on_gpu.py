"""Families and segments on one GPU: the load check passes, and no stop changes a bit."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from kernel_server.engine.attention import PagedAttentionRoute
from kernel_server.engine.loading import Served, load_check, page_shape, serve
from kernel_server.models.registry import open_model
from kernel_server.models.resumable import ResumableModel
from kernel_server.protocol.errors import UnsupportedModel
from tests.engine.bookkeeper import Books, walk
from tests.gpu.conftest import Turn
from tests.models import tiny

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32


def on_gpu(name: str, dtype: torch.dtype) -> ResumableModel:
    return ResumableModel(tiny.family(name, dtype).to("cuda"), PagedAttentionRoute())


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", [*tiny.REQUIRED, *tiny.OTHERS])
def test_a_family_passes_the_load_check(name: str, dtype: torch.dtype) -> None:
    model = on_gpu(name, dtype)

    assert load_check(model, page_shape(model)).passed


@pytest.mark.parametrize("name", tiny.REFUSED)
def test_a_family_that_cannot_be_exact_is_refused(name: str) -> None:
    kind, fields, words = tiny.REFUSED[name]
    with pytest.raises(UnsupportedModel, match=words):
        model = ResumableModel(tiny.build(kind, fields, BF16).to("cuda"), PagedAttentionRoute())
        load_check(model, page_shape(model))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", tiny.REQUIRED)
def test_stops_forks_moves_and_company_change_no_bit(name: str, dtype: torch.dtype) -> None:
    _, different = walk(on_gpu(name, dtype), range(tiny.LAYERS + 3), 6, 21, 4)

    assert different == []


@pytest.fixture(scope="module")
def large(turn: Turn) -> Iterator[Callable[[], Served]]:
    """Gives the model when called: pytest holds what a fixture yields until after its end."""
    with turn():  # a few such models and their pages are more than the card has
        begin = time.perf_counter()
        loaded = open_model(geometry="llama-2-13b", device="cuda:0", dtype="bfloat16")
        made = time.perf_counter()
        served = [serve(loaded.model, kv_memory_bytes=8 << 30)]
        print(f"13B: weights {made - begin:.1f} s, check {time.perf_counter() - made:.1f} s")
        print(served[0].report.as_dict())
        yield lambda: served[0]
        del loaded
        served.clear()
        gc.collect()  # modules refer to each other in circles
        torch.cuda.empty_cache()


def test_a_13b_geometry_passes_the_load_check_in_pages_of_a_few_megabytes(
    large: Callable[[], Served],
) -> None:
    assert large().report.passed
    assert 4 << 20 <= large().cache.page_bytes <= 8 << 20


def test_no_stop_in_a_13b_geometry_changes_a_bit(large: Callable[[], Served]) -> None:
    stops = [0, 1, 10, 21, 39, 40, 41]
    _, different = walk(large().model, stops, 256, 900, 3, pages=1600, page_tokens=32)

    assert different == []


def test_a_decode_of_a_13b_geometry_gives_the_same_bits_every_time(
    large: Callable[[], Served],
) -> None:
    books = Books(large().model, chunk=512, pages=600, page_tokens=32)
    session = books.launch(large().model.sample_ids(900))
    books.run(session)
    runs = []
    for _ in range(30):
        again = books.fork(session)
        runs.append(books.generate(again, 6).logits)
        books.drop(again)

    assert all(torch.equal(torch.stack(run), torch.stack(runs[0])) for run in runs)
