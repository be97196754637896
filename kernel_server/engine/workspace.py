"""How much memory a piece of work takes for a while, besides what was there. Measures only."""

from __future__ import annotations

import threading
from collections.abc import Callable

import psutil
import torch

#: How often the resident set is looked at where nobody counts allocations, seconds.
_SAMPLE_S = 0.001


def measure_workspace(device: torch.device, work: Callable[[], object], held: int) -> int:
    """Bytes that `work` takes on a device at its peak; on a GPU with the context.

    held: bytes of tensors that are there already. On the CPU the resident set is sampled, so a
    peak of under a millisecond may be missed.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        free, total = torch.cuda.mem_get_info(device)
        before = torch.cuda.memory_allocated(device)
        context = total - free - torch.cuda.memory_reserved(device)
        work()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_reserved(device)
        torch.cuda.empty_cache()
        return max(0, context) + max(0, before - held) + max(0, peak - before)
    process = psutil.Process()
    start = most = process.memory_info().rss
    ended = threading.Event()

    def sample() -> None:
        nonlocal most
        while not ended.wait(_SAMPLE_S):
            most = max(most, process.memory_info().rss)

    sampler = threading.Thread(target=sample, name="workspace", daemon=True)
    sampler.start()
    try:
        work()
    finally:
        ended.set()
        sampler.join()
    return max(most, process.memory_info().rss) - start
