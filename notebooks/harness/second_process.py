"""The baseline of company: stock transformers in a process of its own, with weights of its own.

    python -m notebooks.harness.second_process --dtype bfloat16 --device cuda:0

Who holds a run in a debugger of their own and wants to run another prompt starts a second process.
It answers lines of JSON: the prompt and how many tokens to decode, one each forward, the cache
where stock keeps it; it says how long each took, and how many bytes it holds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from notebooks.harness.child import Child, answer, child


class SecondProcess:
    """A process of stock transformers, as the notebook holds it.

    held_bytes: what it holds with the model loaded and one prompt decoded: of the device's memory
    on a GPU, of the machine's otherwise.
    """

    def __init__(self, process: Child) -> None:
        self._process = process
        self.held_bytes = 0

    def start_decoding(self, ids: Sequence[int], new_tokens: int) -> None:
        """Have it decode; `answer` waits for the times."""
        self._process.send(ids=list(ids), new_tokens=new_tokens)

    def answer(self) -> list[float]:
        """Milliseconds of each decode."""
        found = self._process.read()
        self.held_bytes = int(found["held_bytes"])
        return [float(ms) for ms in found["ms"]]


@contextlib.contextmanager
def second_process(*, geometry: str | None, dtype: str, device: str) -> Iterator[SecondProcess]:
    """Start it, wait until its model is loaded, and end it."""
    arguments = ["--dtype", dtype, "--device", device]
    arguments += ["--geometry", geometry] if geometry is not None else []
    with child("notebooks.harness.second_process", *arguments) as process:
        yield SecondProcess(process)


def main() -> None:
    """Load the model, then answer until the input ends."""
    parser = argparse.ArgumentParser(prog="python -m notebooks.harness.second_process")
    parser.add_argument("--geometry")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    options = parser.parse_args()
    import torch

    from kernel_server.models.registry import open_model

    torch.set_num_threads(1)
    model = open_model(geometry=options.geometry, dtype=options.dtype, device=options.device).model
    answer(ready=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ms = _decode(model, asked["ids"], asked["new_tokens"])
        answer(ms=ms, held_bytes=_held_bytes(options.device))


def _decode(model: Any, ids: list[int], new_tokens: int) -> list[float]:
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    found: list[float] = []
    feed = ids
    with torch.inference_mode():
        for _ in range(new_tokens):
            began = time.perf_counter()
            output = model(
                torch.tensor([feed], device=model.device),
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            # the number is there when the device has done the forward
            feed = [int(output.logits[0, -1].argmax())]
            found.append(1e3 * (time.perf_counter() - began))
    return found[1:]


def _held_bytes(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.memory_reserved())
    import psutil

    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    main()
