"""Pages: their geometry, and rows that are written, gathered, copied and poisoned."""

from __future__ import annotations

import pytest
import torch

from kernel_server.engine.kv_cache import KVCache, LayerKV, PageShape, choose_page_shape

torch.set_num_threads(1)

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("layers", "heads", "dim", "dtype", "tokens", "depth"),
    [
        (40, 40, 128, BF16, 32, 10),  # Llama-2-13B
        (32, 8, 128, BF16, 128, 8),  # Llama-3-8B
        (32, 32, 128, BF16, 32, 8),  # Llama-2-7B
        (36, 8, 128, BF16, 128, 9),  # Qwen3-8B
        (24, 6, 32, FP32, 16, 4),  # small
        (6, 2, 16, FP32, 16, 4),  # tiny: the last group is short
        (3, 2, 16, FP32, 16, 3),
    ],
)
def test_pages_are_a_few_megabytes_on_real_models_and_small_on_small_ones(
    layers: int, heads: int, dim: int, dtype: torch.dtype, tokens: int, depth: int
) -> None:
    shape = choose_page_shape([LayerKV(heads, dim, heads, dim)] * layers, dtype)

    assert (shape.page_tokens, shape.group_layers) == (tokens, depth)
    if layers >= 32:
        assert 4 << 20 <= shape.page_bytes <= 8 << 20


def test_pages_needed_round_up_in_tokens_and_in_layers() -> None:
    shape = PageShape(16, 4, (LayerKV(2, 8, 2, 8),) * 6, FP32)

    assert [shape.pages_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert shape.num_groups == 2
    assert [shape.groups_below(p) for p in (-1, 0, 1, 4, 5, 6, 8)] == [0, 0, 1, 1, 2, 2, 2]
    assert shape.page_bytes == 2 * 4 * 16 * 16 * 4


def small_cache(key_dim: int = 8, value_dim: int = 8) -> KVCache:
    return KVCache(PageShape(4, 3, (LayerKV(2, key_dim, 2, value_dim),) * 5, FP32), 12, "cpu")


@pytest.mark.parametrize("dims", [(8, 8), (12, 8), (8, 12)])
def test_what_is_written_is_read_from_scattered_pages(dims: tuple[int, int]) -> None:
    cache = small_cache(*dims)
    cache.poison(range(12))
    table = [7, 2, 11]
    keys, values = torch.randn(1, 2, 10, dims[0]), torch.randn(1, 2, 10, dims[1])
    slots, rows = cache.slot_rows(table, 0, 9), cache.layer_rows(table)
    last = cache.token_slots(table, 9)
    for layer in range(3):
        cache.write(slots[2 * layer], keys[:, :, :9] + layer)
        cache.write(slots[2 * layer + 1], values[:, :, :9] - layer)
        one = keys[:, :, 9:] + layer, values[:, :, 9:] - layer
        cache.write_token(last[2 * layer : 2 * layer + 2], *one)

    for layer in range(3):
        for first in (0, 3):
            key, value = cache.read(rows[layer], first, 10, cache.shape.layers[layer])
            assert torch.equal(key, keys[:, :, first:] + layer)
            assert torch.equal(value, values[:, :, first:] - layer)

    for first in (0, 3):  # and in one place, layer after layer
        room = cache.room(3, first, 10, cache.shape.layers[0])
        for layer in range(3):
            cache.gather(room, rows[layer])
            assert torch.equal(room.key, keys[:, :, first:] + layer)
            assert torch.equal(room.value, values[:, :, first:] - layer)


def test_writing_touches_no_other_page_and_no_other_token() -> None:
    cache = small_cache()
    cache.poison(range(12))
    cache.write(cache.slot_rows([5, 6], 2, 6)[1], torch.ones(1, 2, 4, 8))
    written = ~cache.pool.isnan()

    assert int(written.sum()) == 4 * 16
    assert written[5, 0, 1, 2:].all()
    assert written[6, 0, 1, :2].all()


def test_a_copied_page_is_equal_and_separate() -> None:
    cache = small_cache()
    cache.pool.normal_()
    cache.copy_page(3, 9)

    assert torch.equal(cache.pool[3], cache.pool[9])
    cache.poison([3])
    assert cache.pool[3].isnan().all()
    assert not cache.pool[9].isnan().any()


def test_page_bytes_are_those_of_the_pool() -> None:
    cache = small_cache()

    assert cache.page_bytes * cache.num_pages == cache.pool.nbytes
