"""What must hold of a whole kernel, whatever the device: bodies shared by the CPU and GPU tests."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from djinn_nb import Finished, Session, Stopped
from notebooks.harness.exactness import (
    Prompt,
    Trace,
    different,
    misplaced_calls,
    random_ids,
    reference_run,
    stopped_run,
    watching,
)
from notebooks.harness.inprocess import Local


def prompt_of(local: Local, chunks: float, new_tokens: int = 6, seed: int = 0) -> Prompt:
    """A prompt of so many prefill chunks, drawn with a temperature so that bits matter."""
    count = int(chunks * local.segments.prefill_chunk)
    ids = random_ids(count, local.kernel.info.vocab_size, seed)
    return Prompt(ids, new_tokens, temperature=0.8, seed=seed)


def stops_change_nothing(local: Local, chunks: float = 3.5) -> None:
    """Stopping at each location of every forward leaves logits, tokens and layer calls alone."""
    prompt = prompt_of(local, chunks)
    places: list[int | str] = ["embedding", *range(local.num_layers), "final_norm", "logits"]
    with watching(local) as watch:
        reference = reference_run(local, watch, prompt)
        for place in places:
            trace = stopped_run(local, watch, prompt, place)

            assert trace.differs_from(reference) == 0, place
            assert misplaced_calls(local, trace, len(prompt.ids)) == 0, place
            assert len(trace.stops) == prompt.new_tokens, place
            for _, location, ran, stated in trace.stops:
                expected = _layers_run(location, local.num_layers)
                assert (ran, stated) == (expected, expected), location


def _layers_run(location: str, num_layers: int) -> int:
    if location.startswith("layers."):
        return int(location.split(".")[1]) + 1
    return 0 if location == "embedding" else num_layers


def random_walks_end_alike(local: Local, seed: int, steps: int = 60) -> None:
    """Sessions stepped, forked, looked at and identity-edited in any order end as if left alone."""
    rng = random.Random(seed)
    prompts = [
        prompt_of(local, chunks, rng.randint(2, 6), seed + i)
        for i, chunks in enumerate((0.4, 1.0, 2.6))
    ]
    references: list[Trace] = []
    with watching(local) as watch:
        for prompt in prompts:
            references.append(reference_run(local, watch, prompt))
    live: list[tuple[Session, int]] = [(p.launch(local), i) for i, p in enumerate(prompts)]
    for _ in range(steps):
        session, which = rng.choice(live)
        if session.status == "finished":
            continue
        stop = _random_move(rng, session, local)
        if isinstance(stop, Stopped):
            _look(rng, stop)
            if rng.random() < 0.25 and len(live) < 8:
                live.append((session.fork(), which))
        if rng.random() < 0.1 and len(live) > 3:
            gone, _ = live.pop(rng.randrange(3, len(live)))
            gone.terminate()
    for session, which in live:
        for point in session.breakpoints:
            point.remove()
        if session.status != "finished":
            assert isinstance(session.continue_(), Finished)

        length = len(prompts[which].ids)
        assert tuple(session.tokens[length:]) == references[which].tokens
        assert different(session.logits, references[which].last) == 0
        session.terminate()


def _random_move(rng: random.Random, session: Session, local: Local) -> Any:
    layers = local.num_layers
    move = rng.randrange(8)
    if move == 0:
        session.break_at(rng.randrange(layers), once=True)
        return session.continue_()
    if move == 1:
        return session.next()
    if move == 2:
        return session.step_out()
    if move == 3:
        return session.run_to(rng.choice(["embedding", "final_norm", rng.randrange(layers)]))
    if move == 4:
        session.break_at(rng.randrange(layers), condition="position % 3 == 1 and norm > 0")
        return session.continue_()
    if move == 5:
        return session.step_in()
    if move == 6:
        layer = rng.randrange(layers)
        site = rng.choice(local.kernel.info.sites[layer]).site
        return session.run_to(f"layers.{layer}.{site}")
    for point in session.breakpoints:
        point.disable()
    return session.next()


def _look(rng: random.Random, stop: Stopped) -> None:
    """Look, and edit in ways that change no bit or are taken back."""
    choice = rng.randrange(6)
    if choice == 0 and "attention." not in stop.location and "neurons" not in stop.location:
        _ = stop.lens(top_k=2)
    elif choice == 1:
        _ = stop.value.numpy()
    elif choice == 2:
        assert stop.edit(scale=1.0).elements_changed == 0
    elif choice == 3:
        vector = np.ones(int(np.prod(stop.value.shape[1:])), np.float32)
        assert stop.edit(add=vector, alpha=0.0).elements_changed == 0
    elif choice == 4:
        stop.edit(scale=0.5, tokens=-1)
        stop.undo()


def undo_gives_the_same_bits(local: Local) -> None:
    """A value edited and undone is the value before, and the run goes on as the reference."""
    prompt = prompt_of(local, 1.5)
    with watching(local) as watch:
        reference = reference_run(local, watch, prompt)
    session = prompt.launch(local)
    session.break_at(1)
    stop = session.continue_()
    assert isinstance(stop, Stopped)
    before = stop.value.numpy()
    edit = stop.edit(scale=3.0, tokens=[0, -1])
    changed = stop.value.numpy()
    stop.edit(zero=True, channels=slice(0, 4))
    stop.undo()

    assert edit.elements_changed > 0
    assert different(stop.value.numpy(), changed) == 0
    stop.undo()
    assert different(stop.value.numpy(), before) == 0
    for point in session.breakpoints:
        point.remove()
    session.continue_()
    assert tuple(session.tokens[len(prompt.ids) :]) == reference.tokens
    assert different(session.logits, reference.last) == 0
    session.terminate()


def sticky_edit_equals_a_hook(local: Local, tolerance: float) -> None:
    """Adding a vector at every forward gives stock's logits with the same torch hook."""
    layer = local.num_layers // 2
    prompt = prompt_of(local, 0.8, new_tokens=4)
    prompt = Prompt(prompt.ids, 4)
    generator = torch.Generator().manual_seed(3)
    vector = torch.randn(local.kernel.info.hidden_size, generator=generator)
    session = prompt.launch(local)
    session.break_at(layer, once=True)
    stop = session.continue_()
    assert isinstance(stop, Stopped)
    stop.edit(add=vector.numpy(), alpha=0.5, sticky=True)
    session.continue_()
    logits = session.logits
    expected = _stock_with_hook(local, layer, vector * 0.5, session.tokens[:-1])

    assert logits is not None
    scale = float(np.std(expected))
    assert float(np.abs(logits - expected).max()) / scale < tolerance
    session.terminate()


@torch.inference_mode()
def _stock_with_hook(local: Local, layer: int, vector: torch.Tensor, ids: list[int]) -> Any:
    stock = local.model.stock()
    target = next(
        child
        for i, child in enumerate(stock.get_submodule(local.model.anatomy.layers_path).children())
        if i == layer
    )

    def add(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        made = (hidden.float() + vector.to(hidden.device)).to(hidden.dtype)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    hook = target.register_forward_hook(add)
    try:
        output = stock(torch.tensor([ids], device=stock.device), use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return output.logits[0, -1].float().cpu().numpy()
