"""Whole sessions against stock transformers: decode at 128 and 400 tokens, prefill of 512.

Ours: the whole kernel (requests, state, engine, pages, default capture) in this process. Stock: the
same weights, DynamicCache, sdpa, `logits_to_keep=1`. One thread, the bundled model, float32; the
two alternate within one run, and the ratio is taken pair by pair, since the machine's speed drifts.
`python -m tests.benchmarks.forwards` prints the record as JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from djinn_nb import Session
from notebooks.harness.exactness import random_ids
from notebooks.harness.inprocess import Local, local_kernel

REPETITIONS = 30
#: decodes timed in one repetition
DECODES = 16
CONTEXTS = (128, 400)
PREFILL = 512
#: conditions that never hold, for the cost of an armed breakpoint
UNHIT = ('token == " to" and position < 0', "position > 100000", "forward == 100000", "norm > 1e9")

Arm = Callable[[], float]


def measure(repetitions: int = REPETITIONS) -> dict[str, Any]:
    """Seconds per forward of every arm, alternating, and ours ÷ stock pair by pair."""
    torch.set_num_threads(1)
    with local_kernel(dtype="float32", device="cpu", prefill_chunk=512, check=False) as local:
        stock = local.model.stock()
        pairs: dict[str, tuple[Arm, Arm]] = {}
        for context in CONTEXTS:
            ids = random_ids(context, local.kernel.info.vocab_size, context)
            pairs[f"decode at {context} tokens"] = (
                lambda ids=ids: _our_decode(local, ids),  # type: ignore[misc]
                lambda ids=ids: _stock_decode(stock, ids),  # type: ignore[misc]
            )
        ids = random_ids(PREFILL, local.kernel.info.vocab_size, PREFILL)
        pairs[f"prefill of {PREFILL} tokens"] = (
            lambda: _our_prefill(local, ids),
            lambda: _stock_prefill(stock, ids),
        )
        context = random_ids(CONTEXTS[0], local.kernel.info.vocab_size, 1)
        pairs["decode with 4 unhit breakpoints"] = (
            lambda: _our_decode(local, context, UNHIT),
            lambda: _our_decode(local, context),
        )
        return _alternate(pairs, repetitions)


def _alternate(pairs: dict[str, tuple[Arm, Arm]], repetitions: int) -> dict[str, Any]:
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in pairs}
    for turn in range(repetitions + 2):
        for name, (ours, theirs) in pairs.items():
            # who goes first changes, so that neither always meets the other's caches
            if turn % 2:
                second, first = theirs(), ours()
            else:
                first, second = ours(), theirs()
            if turn >= 2:  # the first two warm up
                times[name][0].append(first)
                times[name][1].append(second)
    return {
        "repetitions": repetitions,
        "ms": {
            name: [_spread([1e3 * t for t in each]) for each in both]
            for name, both in times.items()
        },
        "ratio": {
            name: _spread([a / b for a, b in zip(*both, strict=True)])
            for name, both in times.items()
        },
        "difference_us": {
            name: _spread([1e6 * (a - b) for a, b in zip(*both, strict=True)])
            for name, both in times.items()
        },
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)}


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _our_decode(local: Local, ids: Sequence[int], conditions: Sequence[str] = ()) -> float:
    """Seconds per decode, from the call that continues to the answer that it is finished."""
    session: Session = local.server.launch(list(ids), max_new_tokens=DECODES + 1)
    session.break_at("logits", when="prefill", once=True)
    session.continue_()
    for layer, condition in enumerate(conditions):
        session.break_at(5 * layer, condition=condition)
    seconds = _timed(session.continue_)
    decodes = len(session.tokens) - len(ids) - 1
    session.terminate()
    return seconds / decodes


def _our_prefill(local: Local, ids: Sequence[int]) -> float:
    session = local.server.launch(list(ids), max_new_tokens=1)
    seconds = _timed(session.continue_)
    session.terminate()
    return seconds


@torch.inference_mode()
def _stock_decode(stock: PreTrainedModel, ids: Sequence[int]) -> float:
    cache = DynamicCache(config=stock.config)
    output = stock(torch.tensor([list(ids)]), past_key_values=cache, logits_to_keep=1)
    tokens = []

    def decode() -> None:
        nonlocal output
        for _ in range(DECODES):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(token))  # a session knows its tokens as it goes
            output = stock(token, past_key_values=cache, logits_to_keep=1)
        tokens.append(int(output.logits[0, -1].argmax()))

    return _timed(decode) / DECODES


@torch.inference_mode()
def _stock_prefill(stock: PreTrainedModel, ids: Sequence[int]) -> float:
    prompt = torch.tensor([list(ids)])

    def prefill() -> None:
        cache = DynamicCache(config=stock.config)
        int(stock(prompt, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax())

    return _timed(prefill)


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
