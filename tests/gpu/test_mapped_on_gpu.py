"""Small things between the host and a GPU, beside copies that keep its copy engines busy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from kernel_server import mapped
from kernel_server.engine.sampler import sample
from kernel_server.mapped import to_device, to_host
from kernel_server.state.instructions import Sampling

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda:0")


def test_numbers_arrive_as_they_were_sent() -> None:
    """Through both halves of the memory, and the ones too large for it."""
    ring = 2 * mapped.MAX_BYTES // 8
    sent: list[list[int]] = []
    count = 0
    while count < 3 * ring:
        size = (len(sent) * 7919) % (ring // 3) + 1
        sent.append([(count + i) % 65_537 - 7 for i in range(size)])
        count += size
    found = [to_device(numbers, GPU) for numbers in sent]
    for numbers, tensor in zip(sent, found, strict=True):
        assert tensor.device == GPU and tensor.dtype == torch.int64
        assert torch.equal(tensor.cpu(), torch.tensor(numbers))
    assert to_device([], GPU).tolist() == []


def test_a_half_is_not_written_before_it_was_read() -> None:
    """With the device held up, more numbers than the memory holds."""
    half = mapped.MAX_BYTES // 8
    torch.cuda._sleep(200_000_000)  # cycles: some tenth of a second
    found = [to_device([k] * (half // 2 + 1), GPU) for k in range(5)]
    for k, tensor in enumerate(found):
        assert bool((tensor == k).all()), k


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool]
)
def test_every_bit_comes_down(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    size = {torch.bool: 1}.get(dtype, dtype.itemsize)
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (3, 40 * size), dtype=torch.uint8)
    here = bits.view(dtype)  # NaN of every kind and negative zero among them
    for tensor in (here.to(GPU), here.to(GPU).T):
        found = to_host(tensor)
        assert found.device.type == "cpu" and found.shape == tensor.shape
        wanted = tensor.cpu().contiguous().view(torch.uint8)
        assert torch.equal(found.contiguous().view(torch.uint8), wanted)
    assert to_host(here.to(GPU)[0, 0]).shape == ()
    large = torch.zeros(mapped.MAX_BYTES + 8, dtype=torch.uint8, device=GPU)
    assert to_host(large).numel() == large.numel()


@contextlib.contextmanager
def both_engines_busy(count: int) -> Iterator[Callable[[], bool]]:
    """So many copies of some 5 ms each way; tells whether they are still under way."""
    size = 1 << 28
    here = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.empty(size, dtype=torch.uint8, device=GPU) for _ in range(2)]
    ways = (torch.cuda.Stream(GPU), there[0], here[0]), (torch.cuda.Stream(GPU), here[1], there[1])
    torch.cuda.synchronize()
    last = []
    for stream, target, source in ways:
        with torch.cuda.stream(stream):
            for _ in range(count):
                target.copy_(source, non_blocking=True)
            last.append(stream.record_event())
    yield lambda: not any(event.query() for event in last)
    torch.cuda.synchronize()


def times_done(what: Callable[[], object]) -> int:
    """How often something is done before copies that keep both engines busy are made."""
    # the first times memory is pinned and kernels are loaded, which waits for everything
    with both_engines_busy(2):
        for _ in range(3):
            what()
    count = 0
    with both_engines_busy(450) as still_busy:
        while still_busy():
            what()
            count += 1
    return count


#: Done so often, it does not wait for the copies; a machine that is busy takes its time for each.
OFTEN = 10


def test_they_do_not_wait_for_the_copy_engines() -> None:
    def draw() -> None:
        assert to_host(to_device([3, 1, 4], GPU) * 2).tolist() == [6, 2, 8]
        assert sample(logits, Sampling(temperature=0.0, top_p=1.0, seed=0, position=3)) == 7

    logits = torch.arange(1000, device=GPU).eq(7).float()
    assert times_done(draw) >= OFTEN


def test_the_control_waits_for_them() -> None:
    """A copy of eight bytes, on the same machine: else the test above shows nothing."""
    value = torch.zeros(1, device=GPU)
    assert times_done(value.item) < OFTEN
