"""Where the bytes of this process are. Measures; decides nothing.

Rows come in groups that add up: those of the device to `device used`, those of the host to `host
process`. What is known by name is measured or counted; a group's last row before its total is the
rest, so that no byte is missing.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import psutil

#: (kind, bytes, note)
Row = tuple[str, int, str]


def host_rows(known: list[Row], untouched: int) -> list[Row]:
    """The group of the host's memory.

    known: what is held by name. untouched: bytes of it that were reserved and never written.
    """
    resident = psutil.Process().memory_info().rss
    rest = resident - sum(nbytes for _, nbytes, _ in known) + untouched
    return [
        *known,
        ("never written", -untouched, "of the pools above: reserved, and no memory taken yet"),
        ("rest of the process", rest, "interpreter, libraries, allocator, buffers"),
        ("host process", resident, "resident set of the server process; the sum of the rows above"),
    ]


def device_rows(device: str, known: list[Row]) -> list[Row]:
    """The group of a GPU's memory, as torch counts it and NVML sees it."""
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
    allocated = torch.cuda.memory_allocated(index)
    reserved = torch.cuda.memory_reserved(index)
    named = sum(nbytes for _, nbytes, _ in known)
    used = int(memory.used)
    return [
        *known,
        ("workspace", allocated - named, "other tensors of this process, as torch counts them"),
        ("torch's cache", reserved - allocated, "taken from the driver and free for tensors"),
        ("rest of the device", used - reserved, "context, kernels, and other processes"),
        ("device used", used, "as NVML counts it, all processes; the sum of the rows above"),
        ("device free", int(memory.total) - used, str(properties.name)),
    ]


def untouched_bytes(address: int, nbytes: int) -> int:
    """Of memory at an address, the bytes that the system has not been made to provide.

    Asked of the kernel, page by page (mincore); 0 where it cannot be asked.
    """
    size = mmap.PAGESIZE
    start = -(-address // size) * size
    pages = (address + nbytes - start) // size
    if pages <= 0 or not sys.platform.startswith("linux"):
        return 0
    there = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(pages * size), there) != 0:
        return 0
    return (pages - sum(byte & 1 for byte in bytes(there))) * size
