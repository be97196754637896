"""Small things between the host and a device; what only a GPU can show is in `tests/gpu`."""

from __future__ import annotations

import logging

import torch

from kernel_server import mapped

CPU = torch.device("cpu")


def test_on_a_cpu_they_are_what_they_were() -> None:
    sent = mapped.to_device((3, -1, 2**40), CPU)
    assert sent.dtype == torch.int64 and sent.tolist() == [3, -1, 2**40]
    value = torch.tensor([[1.5, float("nan")]])
    assert mapped.to_host(value) is value
    assert mapped.to_device([], CPU).shape == (0,)


def test_a_gpu_without_such_memory_is_told_of_once(monkeypatch, caplog) -> None:
    tried = []

    def refuses(device: torch.device) -> None:
        tried.append(device)
        raise RuntimeError(f"{device} does not address pinned memory as the host does")

    monkeypatch.setattr(mapped, "_Mapped", refuses)
    monkeypatch.setattr(mapped, "_MAPPED", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode(False))
    gpu = torch.device("cuda", 1)
    with caplog.at_level(logging.WARNING):
        assert mapped._mapped(gpu) is None and mapped._mapped(gpu) is None
    assert tried == [gpu]
    assert [r.getMessage() for r in caplog.records] == [
        "a token waits for copies of pages under way: cuda:1 does not address pinned memory as the"
        " host does"
    ]
