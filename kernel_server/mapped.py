"""Small things between the host and a GPU, through host memory that kernels read and write.

A copy, however small, waits for a copy engine, and an engine that moves pages of a session goes on
with them as long as any are queued: 8 bytes then wait for a gigabyte. A kernel that reads or writes
the host's memory itself waits for nobody. On a CPU nothing is copied at all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["to_device", "to_host"]

log = logging.getLogger(__name__)

#: Larger ones go by a copy engine: the bus is what they wait for then, not the queue.
MAX_BYTES = 1 << 20
_WORD = 8
#: Words after which numbers may begin.
_ALIGNED = 2
#: Integers as wide as one element: what moves are bits.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers as int64 `[n]` on a device; the host does not wait for it.

    >>> to_device([3, 4], torch.device("cpu")).tolist()
    [3, 4]
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    mapped = _mapped(device) if len(numbers) * _WORD <= MAX_BYTES else None
    if mapped is None:
        made = torch.tensor(numbers, dtype=torch.int64)
        return made.pin_memory().to(device, non_blocking=True)
    return mapped.up(numbers)


def to_host(tensor: Tensor) -> Tensor:
    """The tensor on the host, bit for bit, once what was computed before it is done.

    >>> to_host(torch.tensor([2.5])).item()
    2.5
    """
    small = 0 < tensor.nbytes <= MAX_BYTES
    mapped = _mapped(tensor.device) if small and tensor.device.type == "cuda" else None
    return tensor.cpu() if mapped is None else mapped.down(tensor)


class _Mapped:
    """Pinned memory of the host, and the same memory as tensors of one GPU.

    Numbers on their way up lie in one of two halves; a half is written again when the kernels that
    read it are done, which is long after at any but absurd rates. They begin at whole multiples of
    16 bytes, for others are read by a kernel of its own, and what loads a kernel waits for every
    copy under way (15 ms behind twelve of 64 MiB, H200).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        half = MAX_BYTES // _WORD
        self._up_here = torch.zeros(2 * half, dtype=torch.int64).pin_memory()
        self._up_there = _seen_by(self._up_here.view(torch.uint8), device).view(torch.int64)
        self._numbers = self._up_here.numpy()
        self._down_here = torch.zeros(MAX_BYTES, dtype=torch.uint8).pin_memory()
        self._down_there = _seen_by(self._down_here, device)
        self._half = half
        self._next, self._end = 0, half
        self._read = torch.cuda.Event(), torch.cuda.Event()

    def up(self, numbers: Sequence[int]) -> Tensor:
        count = len(numbers)
        with self._lock:
            if self._next + count > self._end:
                self._turn()
            start, end = self._next, self._next + count
            self._next = min(end + end % _ALIGNED, self._end)
            self._numbers[start:end] = numbers
            # not a copy, which would go by a copy engine
            return self._up_there[start:end].add(0)

    def _turn(self) -> None:
        """Go on in the other half, which nothing reads any more."""
        left = self._end // self._half - 1
        self._read[left].record(torch.cuda.current_stream(self._device))
        self._read[1 - left].synchronize()
        self._next, self._end = (0, self._half) if left else (self._half, 2 * self._half)

    def down(self, tensor: Tensor) -> Tensor:
        bits = tensor.contiguous().view(-1).view(_BITS[tensor.itemsize])
        size = bits.nbytes
        with self._lock:
            torch.add(bits, 0, out=self._down_there[:size].view(bits.dtype))
            torch.cuda.current_stream(self._device).synchronize()
            found = self._down_here[:size].clone()
        return found.view(tensor.dtype).view(tensor.shape)


_MAPPED: dict[torch.device, _Mapped | None] = {}
_MAKING = threading.Lock()


def _mapped(device: torch.device) -> _Mapped | None:
    """The memory of this GPU; None, and a line in the log, where it cannot be had."""
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _MAPPED:
        with _MAKING, torch.inference_mode(False), torch.cuda.device(device):
            if device not in _MAPPED:
                _MAPPED[device] = _made(device)
    return _MAPPED[device]


def _made(device: torch.device) -> _Mapped | None:
    try:
        return _Mapped(device)
    except RuntimeError as error:
        # torch may pin memory in the context of another GPU, and then tells that one's tensors
        log.warning("a token waits for copies of pages under way: %s", error)
        return None


class _Address:
    """Where a uint8 tensor lies, as libraries of GPU arrays tell each other."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(tensor.shape),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _seen_by(pinned: Tensor, device: torch.device) -> Tensor:
    """The same bytes, uint8 `[n]`, as a tensor of the GPU: it addresses pinned memory as the host
    does."""

    seen = torch.as_tensor(_Address(pinned), device=device)
    if seen.data_ptr() != pinned.data_ptr():
        raise RuntimeError(f"{device} does not address pinned memory as the host does")
    return seen
