"""What a figure was measured on: device, driver, versions, threads, and a folder name for it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from typing import Any

from kernel_server.doctor.bandwidth import cpu_name

#: Packages whose version may change a bit or a time.
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "rpyc", "djinn-nb")


def device_for(size: str) -> str:
    """The device a notebook of this size runs on: `smoke` on the CPU, `full` on one GPU.

    Raises RuntimeError when a full run finds no CUDA device: a smaller run is no substitute.
    """
    if size == "smoke":
        return "cpu"
    if size != "full":
        raise ValueError(f"size is {size!r}: choose 'smoke' or 'full'")
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("size 'full' needs a CUDA device and there is none: run size 'smoke'")
    return "cuda:0"


def describe(device: str) -> dict[str, Any]:
    """Name, driver and versions behind every figure measured on `device`.

    >>> sorted(describe("cpu"))[:3]
    ['cores', 'device', 'driver']
    """
    import torch

    gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if gpu else cpu_name()
    return {
        "name": name,
        "slug": slug(name if gpu else f"cpu {name}"),
        "device": device,
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "memory_bytes": (
            torch.cuda.get_device_properties(device).total_memory if gpu else _host_bytes()
        ),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | versions(),
    }


def slug(name: str) -> str:
    """A folder name: `NVIDIA H200` → `nvidia-h200`."""
    text = re.sub(r"\((?:r|tm)\)|\bprocessor\b|@.*", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-") or "unknown"


def versions() -> dict[str, str]:
    """Installed versions of what may change a bit or a time; torch says its build itself."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    import torch

    import djinn_nb

    # A checkout on the path has no entry of its own; torch's own version names its build.
    return found | {"torch": torch.__version__, "djinn-nb": djinn_nb.__version__}


def _host_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _driver() -> str:
    import pynvml

    pynvml.nvmlInit()
    try:
        version = pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()
    return version.decode() if isinstance(version, bytes) else str(version)
