"""A card of a given size, imitated on a larger one, and what plain eager code holds on it.

The cap is kept twice: torch's allocator refuses what would exceed it, and the page pool is given
what is left of it after weights, context and workspace, as they were measured.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence

import torch
from transformers import DynamicCache

from notebooks.harness.exactness import Prompt
from notebooks.harness.inprocess import Local
from notebooks.harness.tier_watch import card_bytes


@contextlib.contextmanager
def capped(cap_bytes: int, device: str) -> Iterator[None]:
    """Let torch fail where the process would hold more than `cap_bytes` of the card.

    What torch's allocator does not hold (context, kernels) is measured and taken off. On the CPU
    nothing is capped.
    """
    if not device.startswith("cuda"):
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    outside = card_bytes() - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (cap_bytes - outside) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def wait_until_freed(device: str, timeout_s: float = 30.0) -> None:
    """Wait until no tensor of a closed kernel is left on the card: its threads end a little later.

    To be called when no kernel is open: cuBLAS's workspaces are given back as well, of which torch
    keeps 32 MiB for each thread and stream that ever multiplied, and which recorded graphs use.
    Raises TimeoutError when more than 256 MiB stay.
    """
    gc.collect()
    if not device.startswith("cuda"):
        return
    torch._C._cuda_clearCublasWorkspaces()  # there is no public name for it
    end = time.monotonic() + timeout_s
    while (held := torch.cuda.memory_allocated()) > 256 << 20:
        if time.monotonic() > end:
            raise TimeoutError(f"{held:,} bytes of a closed kernel are still on the card")
        time.sleep(0.2)
        gc.collect()
    torch.cuda.empty_cache()


def beside_the_pages(local: Local) -> int:
    """Bytes of the card in use for anything but the page pool."""
    return card_bytes() - local.cache.pool.nbytes


@torch.inference_mode()
def plain_eager(
    local: Local, prompts: Sequence[Prompt], tokens: Sequence[int], room_bytes: int
) -> tuple[int, int]:
    """How many sessions stock transformers holds, and their bytes, until there is no room.

    Each is prefilled and decoded once, as a script would, and its cache stays where it was made. On
    a GPU that goes on until the allocator fails; on the CPU, where nothing fails, until the caches
    have more than `room_bytes`. tokens: what each decode is fed.
    """
    model = local.model.stock()
    kept: list[DynamicCache] = []
    cache: DynamicCache | None = None
    nbytes = 0
    cuda = local.cache.device.type == "cuda"
    try:
        for prompt, token in zip(prompts, tokens, strict=True):
            cache = DynamicCache(config=model.config)
            for feed in (list(prompt.ids), [token]):
                model(
                    torch.tensor([feed], device=model.device),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            held = _bytes_of(cache)
            if not cuda and nbytes + held > room_bytes:
                break
            kept.append(cache)
            nbytes += held
    except torch.OutOfMemoryError:
        pass  # this is what was looked for: the count says how far it came
    count = len(kept)
    del kept, model, cache
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return count, nbytes


def _bytes_of(cache: DynamicCache) -> int:
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
