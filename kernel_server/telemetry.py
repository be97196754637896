"""Where the bytes of this process are. Measures; decides nothing."""

from __future__ import annotations

import psutil

#: (kind, bytes, note)
Row = tuple[str, int, str]


def process_rows(device: str) -> list[Row]:
    """Memory of this process on the host and, on a GPU, as NVML counts it."""
    resident = psutil.Process().memory_info().rss
    rows: list[Row] = [("host process", resident, "resident set of the server process")]
    if device.startswith("cuda"):
        rows += _device_rows(device)
    return rows


def _device_rows(device: str) -> list[Row]:
    import pynvml
    import torch

    index = torch.device(device).index or 0
    pynvml.nvmlInit()
    try:
        # NVML numbers physical cards; torch numbers the visible ones: match by bus id
        properties = torch.cuda.get_device_properties(index)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    finally:
        pynvml.nvmlShutdown()
    return [
        ("device total", int(memory.total), str(properties.name)),
        ("device used", int(memory.used), "all processes on the card (NVML)"),
        ("device allocator", torch.cuda.memory_allocated(index), "tensors of this process (torch)"),
        ("device reserved", torch.cuda.memory_reserved(index), "taken from the driver by torch"),
    ]
