"""Layers of a decode as CUDA graphs: the same bits, and no layer that is looked into is one."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from djinn_nb import Finished, Session, Stopped
from kernel_server.engine.graphs import LayerGraphs
from notebooks.harness import exactness
from notebooks.harness.exactness import Prompt, different, random_ids
from notebooks.harness.inprocess import Local, local_kernel
from notebooks.harness.tiny import make_folder

pytestmark = pytest.mark.gpu

#: by name: family, dtype; the geometry of a large model with random weights
MODELS = {
    "llama": "float32", "gemma2": "bfloat16", "mistral": "bfloat16", "opt": "bfloat16",
    "gpt2": "float32", "gpt_neox": "bfloat16", "gpt2 geometry": "bfloat16",
}  # fmt: skip


def run(local: Local, prompt: Prompt, *locations: int | str) -> tuple[list[int], Any]:
    """Tokens and last logits of a session that stops at these locations in every forward."""
    session: Session = prompt.launch(local)
    for location in locations:
        session.break_at(location)
    while isinstance(session.continue_(), Stopped):
        pass
    found = list(session.tokens), session.logits
    session.terminate()
    return found


def made(name: str, folder: Path, graphs: bool) -> AbstractContextManager[Local]:
    """A kernel of this model, with graphs or without."""
    source: dict[str, Any] = (
        {"geometry": "gpt2"} if name == "gpt2 geometry" else {"model": make_folder(name, folder)}
    )
    return local_kernel(
        **source, dtype=MODELS[name], device="cuda:0", prefill_chunk=16,
        kv_memory_bytes=64 << 20, cuda_graphs=graphs,
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_graphs_give_the_bits_of_layers_begun_from_the_host(name: str, tmp_path: Path) -> None:
    prompt = Prompt(random_ids(21, 320, seed=3), 12)
    found = {}
    for graphs in (False, True):
        with made(name, tmp_path, graphs) as local:
            recorded = local.segments.graphs
            assert (recorded is not None) == graphs
            if recorded is not None:
                assert recorded.num_recorded == local.num_layers and not recorded.refused
            middle = local.num_layers // 2
            found[graphs] = [
                run(local, prompt),
                run(local, prompt, middle),
                run(local, prompt, middle, f"layers.{middle}.mlp.output"),
            ]
            with exactness.watching(local) as watch:  # hooks: as always, whatever is recorded
                trace = exactness.reference_run(local, watch, prompt)
                assert exactness.misplaced_calls(local, trace, len(prompt.ids)) == 0
            found[graphs].append((list(prompt.ids) + list(trace.tokens), trace.last))
    first_tokens, first_logits = found[False][0]
    for tokens, logits in [*found[False], *found[True]]:
        assert tokens == first_tokens
        assert different(logits, first_logits) == 0


def test_experts_run_as_always(tmp_path: Path) -> None:
    with local_kernel(
        model=make_folder("mixtral", tmp_path), dtype="float32", device="cuda:0",
        prefill_chunk=16, kv_memory_bytes=8 << 20,
    ) as local:  # fmt: skip
        assert local.segments.graphs is None


def test_a_layer_that_cannot_be_recorded_runs_as_always(tmp_path: Path) -> None:
    """A layer whose host waits for the device is found out while it is recorded."""
    prompt = Prompt(random_ids(21, 320, seed=3), 8)
    with made("llama", tmp_path, False) as local:
        wanted = run(local, prompt)
        graphs = local.segments.graphs = LayerGraphs(local.model)
        mlp: Any = local.model.layers[2].mlp
        forward = mlp.forward

        def waits(hidden: torch.Tensor) -> torch.Tensor:
            hidden.sum().item()
            return forward(hidden)

        mlp.forward = waits
        try:
            tokens, logits = run(local, prompt)
        finally:
            del mlp.forward
        assert 2 in graphs.refused and graphs.num_recorded < local.num_layers
        assert tokens == wanted[0] and different(logits, wanted[1]) == 0


def test_sessions_that_take_turns_do_not_meet_in_a_graph(tmp_path: Path) -> None:
    prompts = [Prompt(random_ids(20 + n, 320, seed=n), 10) for n in range(3)]
    with made("llama", tmp_path, True) as local:
        alone = [run(local, prompt) for prompt in prompts]
        sessions = [prompt.launch(local) for prompt in prompts]
        for session in sessions:
            session.break_at(1)
            session.break_at(3)
        going = dict(enumerate(sessions))
        while going:
            for number, session in list(going.items()):
                if isinstance(session.continue_(), Stopped):
                    continue
                tokens, logits = alone[number]
                assert list(session.tokens) == tokens
                assert different(session.logits, logits) == 0
                del going[number]


def test_a_session_that_stands_finds_what_it_stood_with(tmp_path: Path) -> None:
    """Another runs some of the layers meanwhile: graphs work in memory that they share."""
    prompt, other = (Prompt(random_ids(20 + n, 320, seed=n), 4) for n in range(2))
    with made("llama", tmp_path, True) as local:
        tokens, logits = run(local, prompt)
        for here, there in itertools.product(range(local.num_layers), repeat=2):
            session, beside = prompt.launch(local), other.launch(local)
            for one, layer in ((session, here), (beside, there)):
                one.run_to("logits")
                one.run_to(layer)
            assert isinstance(session.continue_(), Finished)
            assert list(session.tokens) == tokens, (here, there)
            assert different(session.logits, logits) == 0, (here, there)
            session.terminate()
            beside.terminate()
