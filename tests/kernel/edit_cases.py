"""What must hold of edits in a whole kernel, whatever the device: bodies for CPU and GPU tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from djinn_nb import Stopped
from kernel_server.protocol import codec
from kernel_server.protocol import messages as m
from notebooks.harness.exactness import different
from notebooks.harness.inprocess import Local
from tests.kernel.cases import prompt_of


def every_kind(hidden: int) -> dict[str, dict[str, Any]]:
    """Arguments of an edit of each kind that changes something, for `[tokens, hidden]`."""
    some = np.random.default_rng(5).standard_normal((3, hidden)).astype(np.float32)
    return {
        "scale": {"scale": 0.9, "tokens": [0, -1]},
        "add": {"add": some[0], "alpha": 0.5, "tokens": slice(3, 19)},
        "set": {"set": some[:2], "tokens": [17, 2]},
        "zero": {"zero": True, "channels": [0, 3]},
        "clamp": {"clamp": (-0.1, 0.2)},
        "project_out": {"project_out": some, "tokens": slice(2, None)},
        "mean": {"mean": True, "tokens": [1, 15, 16, -1]},
        "swap": {"swap": True, "tokens": [1, -2]},
        "patch": {"patch": some[1:], "tokens": [16, 15]},
    }


def every_kind_is_undone_and_runs_alike(local: Local) -> None:
    """Each kind, over a chunk's border, twice: the same bits, and undone the bits before."""
    prompt = prompt_of(local, 1.5, new_tokens=2)
    layer = local.num_layers // 2
    for kind, wishes in every_kind(local.kernel.info.hidden_size).items():
        session = prompt.launch(local)
        stop = session.run_to(layer)
        before = stop.value.numpy()
        edit = stop.edit(**wishes)
        changed = stop.value.numpy()
        assert edit.elements_changed == int((changed != before).sum()) > 0, kind
        stop.edit(scale=2.0)
        stop.edit(**wishes)
        for _ in range(2):
            stop.undo()
        assert different(stop.value.numpy(), changed) == 0, kind
        child = session.fork()
        stop.undo()
        assert different(stop.value.numpy(), before) == 0, kind

        # made ahead, it gives what it gave at the stop
        ahead = prompt.launch(local)
        ahead.run_to("embedding").edit(**wishes, location=layer)
        assert different(ahead.run_to(layer).value.numpy(), changed) == 0, kind
        ours, theirs = ahead.run_to("logits"), child.run_to("logits")
        assert different(ours.value.numpy(), theirs.value.numpy()) == 0, kind
        for done in (session, child, ahead):
            done.terminate()


def a_direction_stays_out_of_every_forward(local: Local) -> None:
    """A sticky projection holds in decodes as in the prefill."""
    hidden = local.kernel.info.hidden_size
    direction = np.random.default_rng(2).standard_normal(hidden).astype(np.float32)
    unit = direction / np.linalg.norm(direction)
    session = prompt_of(local, 1.2, new_tokens=4).launch(local)
    layer = local.num_layers - 1
    edit = session.run_to("embedding").edit(project_out=direction, location=layer, sticky=True)
    tolerance = 1e-5 if local.kernel.info.dtype == "float32" else 2e-2
    for forward in range(4):
        stop = session.run_to(layer)
        x = stop.value.numpy()
        along = np.abs(x @ unit) / np.linalg.norm(x, axis=1)

        assert stop.forward == forward
        assert along.max() < tolerance
        assert edit.elements_changed
    session.terminate()


def the_next_token_is_decided(local: Local) -> None:
    """Force, ban and replace hold in every forward, at any temperature."""
    size = local.kernel.info.vocab_size
    prompt = prompt_of(local, 0.8, new_tokens=5)
    free = prompt.launch(local)
    free.continue_()
    drawn = free.tokens[len(prompt.ids) :]
    eos = set(local.kernel.info.eos_token_ids)
    forced = next(i for i in range(size) if i not in {*drawn, *eos})
    for wishes in ({"force": forced}, {"ban": sorted({*drawn, *eos})}):
        for temperature in (0.0, 1.0, 50.0):
            session = local.server.launch(
                list(prompt.ids),
                max_new_tokens=5,
                temperature=temperature,
                seed=4 if temperature else None,
            )
            session.run_to("embedding").edit(**wishes, sticky=True)
            session.continue_()
            tokens = session.tokens[len(prompt.ids) :]
            assert len(tokens) == 5
            assert set(tokens) == {forced} if "force" in wishes else not {*tokens} & {*drawn}
            session.terminate()
    session = local.server.launch(list(prompt.ids), max_new_tokens=1)
    stop = session.run_to("logits")
    first = int(stop.value.numpy().argmax())
    stop.edit(replace=(first, forced))
    session.continue_()
    assert session.tokens[-1] == forced
    for done in (free, session):
        done.terminate()


def a_patch_equals_a_hook(local: Local, tolerance: float) -> None:
    """Values of A put into B give the logits of stock's B with A's values put there by hooks."""
    layer, rows = local.num_layers // 2, [1, 4, -1]
    a, b = (prompt_of(local, 0.7, new_tokens=1, seed=seed) for seed in (1, 2))
    source, target = a.launch(local), b.launch(local)
    theirs, ours = source.run_to(layer), target.run_to(layer)
    assert isinstance(theirs, Stopped) and isinstance(ours, Stopped)
    edit = ours.edit(patch=theirs.value[np.array(rows) % len(a.ids)], tokens=rows)
    logits = target.run_to("logits").value.numpy()[0]

    taken: list[Tensor] = []
    stock_logits(local, layer, list(a.ids), lambda hidden: taken.append(hidden.clone()) or hidden)

    def put(hidden: Tensor) -> Tensor:
        made = hidden.clone()
        made[0, rows] = taken[0][0, rows]
        return made

    expected = stock_logits(local, layer, list(b.ids), put)
    unpatched = stock_logits(local, layer, list(b.ids), lambda hidden: hidden)
    spread = float(np.std(expected))
    assert edit.tokens_matched == sorted(row % len(b.ids) for row in rows)
    assert float(np.abs(logits - expected).max()) / spread < tolerance
    assert float(np.abs(logits - unpatched).max()) / spread > 2 * tolerance
    for done in (source, target):
        done.terminate()


def a_patch_of_everything_becomes_the_other_run(local: Local) -> None:
    """All of A's residual put into B: B's logits are A's, bit for bit."""
    a, b = (prompt_of(local, 1.5, new_tokens=1, seed=seed) for seed in (1, 2))
    source, target = a.launch(local), b.launch(local)
    theirs, ours = source.run_to(0), target.run_to(0)
    ours.edit(patch=theirs.value)
    left, right = (session.run_to("logits").value.numpy() for session in (source, target))

    assert different(left, right) == 0
    for done in (source, target):
        done.terminate()


def a_patch_from_another_owner_finds_no_session(local: Local) -> None:
    """The value at another owner's stop cannot be had by naming it, even with the right number."""

    def ask(owner: str, message: Any) -> Any:
        return codec.decode(local.kernel.gateway.handle(owner, "here", codec.encode(message)))

    stops = {}
    for owner in ("ann", "bob"):
        launch = m.Launch(token_ids=(1, 2, 3), max_new_tokens=2, stop_on_entry=True)
        made = ask(owner, launch).session
        ask(owner, m.Continue(session_id=made.id, seen=0))
        while (info := ask(owner, m.Describe(session_id=made.id)).session).status == "running":
            time.sleep(0.01)
        stops[owner] = info
    source = m.PatchSource(session_id=stops["ann"].id, seen=stops["ann"].stop_number)
    edit = m.EditSpec(kind="set", location="embedding", source=source)
    mine, seen = stops["bob"].id, stops["bob"].stop_number

    refused = ask("bob", m.AddEdit(session_id=mine, seen=seen, edit=edit))
    assert refused.error.code == "UnknownSession", refused
    assert ask("bob", m.Describe(session_id=mine)).session.edits == ()
    theirs = m.AddEdit(session_id=source.session_id, seen=source.seen, edit=edit)
    assert ask("ann", theirs).edit.elements_changed == 0
    for owner, info in stops.items():
        ask(owner, m.Terminate(session_id=info.id))


@torch.inference_mode()
def stock_logits(
    local: Local, layer: int, ids: list[int], change: Callable[[Tensor], Tensor]
) -> Any:
    """Stock's logits of the last token, with `change` at a layer's output `[1, tokens, hidden]`."""
    stock = local.model.stock()
    layers = stock.get_submodule(local.model.anatomy.layers_path)

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = list(layers.children())[layer].register_forward_hook(hook)
    try:
        output = stock(torch.tensor([ids], device=stock.device), use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return output.logits[0, -1].float().cpu().numpy()
