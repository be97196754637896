"""How fast this machine moves bytes: the limits that benchmarks are compared with.

Between host and device (pinned and pageable, each way and both at once) and within the device, by
chunk size; within the host; between processes through shared memory, a raw socket and our own wire.
Every figure is a median of repetitions with its quartiles, its unit and what timed it. What a
machine does not have is absent and named, never zero.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

KIB, MIB, GIB = 2**10, 2**20, 2**30

#: Bytes of one copy.
CHUNKS = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB)
#: Copies of a chunk are repeated until about this many bytes have moved in one measurement.
AT_LEAST = 64 * MIB
REPETITIONS = 7

Row = dict[str, Any]


def measure(
    device: str | None = None,
    *,
    chunks: Sequence[int] = CHUNKS,
    repetitions: int = REPETITIONS,
) -> dict[str, Any]:
    """Every figure there is on this machine, as data that can be written as JSON.

    device: `cuda:0`, say; None takes the first GPU if there is one, `cpu` measures none.
    chunks: bytes of one copy. A row has `name`, `chunk_bytes`, `unit` (GB/s: 10⁹ bytes a second),
    `median`, `q1`, `q3`, `values` and `source`, what timed it.

    Raises ValueError for a device that is not here.

        found = measure("cpu", chunks=[1 << 20], repetitions=3)
        found["rows"][0]["median"]
    """
    if repetitions < 1 or not chunks or min(chunks) < 1:
        raise ValueError("at least one repetition of at least one chunk of a byte is needed")
    found = _device(device)
    rows: list[Row] = []
    absent: list[str] = []
    if found is None:
        absent.append("host ↔ device and device copies: no CUDA device was measured")
    else:
        rows += _device_rows(found, chunks, repetitions)
    rows += _host_rows(chunks, repetitions)
    more: list[Row] = []
    missing: list[str] = []
    try:
        from kernel_server.doctor import between
    except ImportError as error:
        missing.append(f"shared memory and loopback: {error}")
    else:
        more, missing = between.rows(chunks, repetitions)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "hardware": _hardware(found),
        "repetitions": repetitions,
        "rows": [*rows, *more],
        "absent": [*absent, *missing],
    }


def row(name: str, chunk_bytes: int, moved: int, times: Sequence[float], source: str) -> Row:
    """One figure. moved: bytes of one measurement. times: seconds of each."""
    values = [moved / 1e9 / seconds for seconds in times]
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {
        "name": name,
        "chunk_bytes": chunk_bytes,
        "unit": "GB/s",
        "median": round(middle, 4),
        "q1": round(low, 4),
        "q3": round(high, 4),
        "values": [round(value, 4) for value in values],
        "source": source,
    }


def _device(wanted: str | None) -> str | None:
    if wanted == "cpu":
        return None
    try:
        import torch
    except ImportError:
        if wanted is not None:
            raise ValueError(f"device {wanted!r} needs torch, which is not installed") from None
        return None
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted is None:
        return "cuda:0" if here else None
    index = int(wanted.removeprefix("cuda:")) if wanted.removeprefix("cuda:").isdecimal() else -1
    if not 0 <= index < here:
        raise ValueError(f"device {wanted!r} is not here: there are {here} CUDA devices")
    return f"cuda:{index}"


def _copies(chunk_bytes: int) -> int:
    return max(1, min(256, AT_LEAST // chunk_bytes))


def _device_rows(device: str, chunks: Sequence[int], repetitions: int) -> list[Row]:
    import torch

    largest = max(max(chunks), min(AT_LEAST, 256 * max(chunks)))
    torch.cuda.set_device(device)
    pinned = [torch.empty(largest, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    pageable = torch.zeros(largest, dtype=torch.uint8)
    on_device = [torch.zeros(largest, dtype=torch.uint8, device=device) for _ in range(2)]
    for buffer in pinned:
        buffer.zero_()
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    rows: list[Row] = []

    def over(chunk: int, source: Any, target: Any) -> None:
        for index in range(_copies(chunk)):
            at = index * chunk % (largest - chunk + 1)
            target[at : at + chunk].copy_(source[at : at + chunk], non_blocking=True)

    def evented(work: Callable[[], None]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def walled(work: Callable[[], None]) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def both(chunk: int) -> None:
        for index in range(_copies(chunk)):
            at = index * chunk % (largest - chunk + 1)
            piece = slice(at, at + chunk)
            with torch.cuda.stream(one):
                on_device[0][piece].copy_(pinned[0][piece], non_blocking=True)
            with torch.cuda.stream(two):
                pinned[1][piece].copy_(on_device[1][piece], non_blocking=True)

    Arm = tuple[str, Callable[[Callable[[], None]], float], str, Callable[[int], None], int]
    arms: list[Arm] = [
        ("host to device, pinned", evented, "CUDA event",
         lambda c: over(c, pinned[0], on_device[0]), 1),
        ("device to host, pinned", evented, "CUDA event",
         lambda c: over(c, on_device[0], pinned[1]), 1),
        ("both ways at once, pinned", walled, "wall clock", both, 2),
        ("host to device, pageable", walled, "wall clock",
         lambda c: over(c, pageable, on_device[0]), 1),
        ("device to host, pageable", walled, "wall clock",
         lambda c: over(c, on_device[0], pageable), 1),
        ("device copy", evented, "CUDA event", lambda c: over(c, on_device[0], on_device[1]), 1),
    ]  # fmt: skip
    for chunk in chunks:
        moved = chunk * _copies(chunk)
        for name, timer, source, work, ways in arms:
            timer(lambda work=work, chunk=chunk: work(chunk))  # type: ignore[misc]
            times = [
                timer(lambda work=work, chunk=chunk: work(chunk))  # type: ignore[misc]
                for _ in range(repetitions)
            ]
            rows.append(row(name, chunk, ways * moved, times, source))
    return rows


def _host_rows(chunks: Sequence[int], repetitions: int) -> list[Row]:
    rows = []
    for chunk in chunks:
        source, target = np.zeros(chunk, np.uint8), np.ones(chunk, np.uint8)
        copies = _copies(chunk)
        times = []
        for _ in range(repetitions + 1):
            began = time.perf_counter()
            for _ in range(copies):
                np.copyto(target, source)
            times.append(time.perf_counter() - began)
        rows.append(row("host copy", chunk, chunk * copies, times[1:], "wall clock"))
    return rows


def _hardware(device: str | None) -> dict[str, Any]:
    made: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | _versions(),
        "device": None,
        "driver": None,
        "cuda": None,
    }
    if device is not None:
        import torch

        made["device"] = torch.cuda.get_device_name(device)
        made["cuda"] = torch.version.cuda
        made["driver"] = _driver()
    return made


def _versions() -> dict[str, str]:
    found = {}
    for name in ("djinn-nb", "torch", "numpy", "rpyc"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor's own name, or its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        import pynvml
    except ImportError:
        return None
    pynvml.nvmlInit()
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def table(found: dict[str, Any]) -> list[str]:
    """The figures as lines: a row per kind of copy, a column per chunk size, GB/s."""
    names = list(dict.fromkeys(one["name"] for one in found["rows"]))
    sizes = sorted({one["chunk_bytes"] for one in found["rows"]})
    cells = {(one["name"], one["chunk_bytes"]): one["median"] for one in found["rows"]}
    hardware = found["hardware"]
    lines = [
        f"{hardware['device'] or 'no GPU'} · {hardware['cpu']} · medians of"
        f" {found['repetitions']} in GB/s (10⁹ bytes a second)",
        f"{'':<28}" + "".join(f"{_short(size):>10}" for size in sizes),
    ]
    for name in names:
        values = (cells.get((name, size)) for size in sizes)
        lines.append(
            f"{name:<28}" + "".join(f"{'–' if v is None else f'{v:.3g}':>10}" for v in values)
        )
    return [*lines, *(f"absent: {what}" for what in found["absent"])]


def _short(nbytes: int) -> str:
    for size, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= size:
            return f"{nbytes / size:g} {unit}"
    return f"{nbytes} B"
