"""What must hold of the sites inside a layer, whatever the device: bodies shared by CPU and GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from djinn_nb import Finished, Session, Stopped
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import NotSupported
from kernel_server.protocol.location import INNER_SITES, location_at
from notebooks.harness.exactness import Prompt, different, reference_run, watching
from notebooks.harness.inprocess import Local
from tests.kernel.cases import prompt_of


def layers_of(local: Local) -> tuple[int, ...]:
    """The first layer, one in the middle and the last."""
    return (0, local.num_layers // 2, local.num_layers - 1)


def sites_of(local: Local, layer: int) -> list[str]:
    return [layout.site for layout in local.kernel.info.sites[layer]]


def stopped_at(
    local: Local, prompt: Prompt, place: str, forward: int = 0
) -> tuple[Session, Stopped]:
    session = prompt.launch(local)
    for _ in range(forward):
        session.run_to("logits")
    stop = session.run_to(place)
    assert isinstance(stop, Stopped) and (stop.location, stop.forward) == (place, forward)
    return session, stop


def every_site_goes_on_as_if_never_met(local: Local, chunks: float = 2.5) -> None:
    """Stopping at, looking at and identity-editing any site changes no bit of what follows."""
    prompt = prompt_of(local, chunks, new_tokens=3)
    with watching(local) as watch:
        reference = reference_run(local, watch, prompt)
    for layer in layers_of(local):
        for site in sites_of(local, layer):
            for forward in (0, 2):
                session, stop = stopped_at(local, prompt, f"layers.{layer}.{site}", forward)
                assert stop.layers_executed == layer, site
                fed = len(prompt.ids) if forward == 0 else 1
                assert summary(stop).shape[0] == fed, site
                assert stop.edit(scale=1.0).elements_changed == 0, site
                child = session.fork()
                for one in (session, child):
                    assert isinstance(one.continue_(), Finished)
                    assert tuple(one.tokens[len(prompt.ids) :]) == reference.tokens, site
                    assert different(one.logits, reference.last) == 0, site
                    one.terminate()


def stepping_in_passes_every_site_and_changes_nothing(local: Local) -> None:
    """Step in, site by site through two forwards, ends as the run that never stopped."""
    prompt = prompt_of(local, 1.5, new_tokens=2)
    with watching(local) as watch:
        reference = reference_run(local, watch, prompt)
    session = prompt.launch(local)
    met: list[str] = []
    replayed = 0
    while isinstance(stop := session.step_in(), Stopped):
        met.append(stop.location)
        replayed = max(replayed, session.refresh().layers_replayed)
    expected = ["embedding"]
    for layer in range(local.num_layers):
        expected += [f"layers.{layer}.{site}" for site in [*sites_of(local, layer), "output"]]
    expected += ["final_norm", "logits"]

    assert met == expected * 2
    assert replayed == sum(len(sites_of(local, layer)) for layer in range(local.num_layers))
    assert tuple(session.tokens[len(prompt.ids) :]) == reference.tokens
    assert different(session.logits, reference.last) == 0
    session.terminate()


def an_edit_at_any_site_shows_and_is_undone_exactly(local: Local) -> None:
    """An edit at a site changes what follows; undone, not a bit of it."""
    prompt = prompt_of(local, 2.5, new_tokens=2)
    layer = local.num_layers // 2
    with watching(local) as watch:
        reference = reference_run(local, watch, prompt)
    for site in sites_of(local, layer):
        session, stop = stopped_at(local, prompt, f"layers.{layer}.{site}")
        twin = session.fork()
        before = summary(stop)
        edit = stop.edit(scale=0.0, tokens=slice(1, None))
        assert edit.elements_changed > 0, site
        session.step_out()
        edited = session_logits(session)
        session.terminate()

        other = twin.refresh()
        stand = Stopped(twin, other)
        stand.edit(scale=0.0, tokens=slice(1, None))
        stand.undo()
        assert np.array_equal(summary(stand).per_token.numpy(), before.per_token.numpy()), site
        twin.step_out()
        plain = session_logits(twin)
        assert different(plain, edited) > 0, site
        twin.continue_()
        assert different(twin.logits, reference.last) == 0, site
        twin.terminate()


def previews_equal_what_follows(local: Local) -> None:
    """Both arms of a preview are, bit for bit, the logits of the run with the edit and without."""
    prompt = prompt_of(local, 1.5, new_tokens=2)
    layer = local.num_layers // 2
    places = [f"layers.{layer}.{site}" for site in [*sites_of(local, layer), "output"]]
    for place in ["embedding", *places, "final_norm", "logits"]:
        for forward in (0, 1):
            session, stop = stopped_at(local, prompt, place, forward)
            events = session.newest.event_seq
            spec = m.EditSpec(kind="scale", factor=0.5, location=place)
            reply = ask(session, m.Preview(session_id=session.id, seen=stop.number, edits=(spec,)))
            assert reply.elements_changed[0] > 0, place
            assert session.refresh().event_seq == events, "a preview was told of"
            plain = session.fork()
            plain.step_out() if place != "logits" else None
            assert (
                different(session_logits(plain), tensor(local, session, reply.logits_before)) == 0
            )
            stop.edit(scale=0.5)
            session.step_out() if place != "logits" else None
            assert (
                different(session_logits(session), tensor(local, session, reply.logits_after)) == 0
            )
            session.terminate()
            plain.terminate()


def attribution_sums_to_the_logit(local: Local, tolerance: float) -> None:
    """The parts of a logit add up to it, in a prefill and in a decode, from any stop."""
    prompt = prompt_of(local, 1.5, new_tokens=3)
    for place, forward in (("layers.0.output", 0), ("final_norm", 1)):
        session, stop = stopped_at(local, prompt, place, forward)
        reply = ask(session, m.ReadAttribution(session_id=session.id, seen=stop.number))
        session.step_out()
        logits = session_logits(session)
        scale = float(np.std(logits))

        assert reply.logit == logits[reply.token_id] == logits.max()
        assert abs(reply.rest) < tolerance * scale, (place, reply.rest, reply.logit)
        assert set(reply.kinds) == {"embedding", "head", "attention", "mlp", "bias"}
        session.terminate()


def attention_is_what_the_site_holds(local: Local) -> None:
    """Weights looked up on a scratch fork are those of a stop at the pattern; rows add up to 1."""
    prompt = prompt_of(local, 2.5, new_tokens=3)
    layer = local.num_layers // 2
    for forward in (0, 1):
        session, stop = stopped_at(local, prompt, f"layers.{layer}.attention.pattern", forward)
        held = stop.value.numpy()
        message = m.ReadAttention(session_id=session.id, seen=stop.number, layer=layer)
        weights = tensor(local, session, ask(session, message).weights)

        assert np.array_equal(held.reshape(weights.shape), weights)
        assert np.allclose(weights.astype(np.float32).sum(-1), 1, atol=2e-2)
        session.terminate()


def edits_equal_hooks(local: Local, tolerance: float) -> None:
    """Edits inside a Llama layer give stock's logits with the same change made by torch hooks."""
    layer = local.num_layers // 2
    prompt = Prompt(prompt_of(local, 1.5).ids, 2)
    info = local.kernel.info
    vector = np.random.default_rng(1).standard_normal(info.hidden_size).astype(np.float32)
    width = info.sites[layer][0].width
    neurons = next(s.width for s in info.sites[layer] if s.site == "mlp.neurons") // 2
    changes: dict[str, tuple[dict[str, Any], str, Callable[[torch.Tensor], torch.Tensor]]] = {
        "attention.output": (
            {"add": vector, "alpha": 0.6},
            "self_attn",
            lambda x: x + 0.6 * torch.tensor(vector, device=x.device).to(x.dtype),
        ),
        "mlp.output": ({"scale": -2.0}, "mlp", lambda x: x * -2.0),
        "attention.heads": (
            {"zero": True, "channels": slice(0, width)},
            "self_attn.o_proj",
            lambda x: torch.cat([torch.zeros_like(x[..., :width]), x[..., width:]], -1),
        ),
        "mlp.neurons": (
            {"zero": True, "channels": slice(0, neurons)},
            "mlp.down_proj",
            lambda x: torch.cat([torch.zeros_like(x[..., :neurons]), x[..., neurons:]], -1),
        ),
    }
    for site, (edit, path, change) in changes.items():
        session, stop = stopped_at(local, prompt, f"layers.{layer}.{site}")
        if site == "attention.heads":
            edit = {"zero": True, "heads": 0}
        stop.edit(**edit)
        session.step_out()
        logits = session_logits(session)
        before_module = path.endswith("proj")
        expected = stock_with(local, layer, path, change, before_module, list(prompt.ids))
        plain = stock_with(local, layer, path, lambda x: x, before_module, list(prompt.ids))
        scale = float(np.std(expected))

        assert np.abs(logits - expected).max() / scale < tolerance, site
        assert np.abs(plain - expected).max() / scale > 2 * tolerance, f"{site}: nothing changed"
        session.terminate()


@torch.inference_mode()
def stock_with(
    local: Local,
    layer: int,
    path: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    before_module: bool,
    ids: list[int],
) -> np.ndarray[Any, Any]:
    """Stock's last logits with a module's input or output changed."""
    stock = local.model.stock()
    target = stock.get_submodule(f"{local.model.anatomy.layers_path}.{layer}.{path}")

    def enter(module: nn.Module, inputs: Any) -> Any:
        return (change(inputs[0]), *inputs[1:])

    def leave(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    if before_module:
        hook = target.register_forward_pre_hook(enter)
    else:
        hook = target.register_forward_hook(leave)
    try:
        made = stock(torch.tensor([ids], device=stock.device), use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    found: np.ndarray[Any, Any] = made.logits[0, -1].float().cpu().numpy()
    return found


def sites_that_are_off_are_refused(local: Local) -> None:
    """A site that a layer has not is refused by its name and reason, and no other is."""
    for layer in layers_of(local):
        have = set(sites_of(local, layer))
        for site in INNER_SITES:
            session = prompt_of(local, 0.5).launch(local)
            if site in have:
                assert isinstance(session.run_to(f"layers.{layer}.{site}"), Stopped)
            else:
                assert site in local.kernel.info.sites_off
            session.terminate()


def a_router_is_read_with_the_edits_on_the_way(local: Local) -> None:
    """Choices of every token, in prefill and decode; an edit before the router shows, one behind it
    does not, and nobody's run is changed; a model without experts is refused by name."""
    prompt = prompt_of(local, 2.5, new_tokens=3)
    layer = local.num_layers // 2
    for forward in (0, 1):
        session, stop = stopped_at(local, prompt, f"layers.{layer}.output", forward)
        question = m.ReadRouter(session_id=session.id, seen=stop.number, layer=layer)
        if "Mixtral" not in local.kernel.info.architecture:
            with pytest.raises(NotSupported, match=f"layer {layer} of this .* model has no router"):
                ask(session, question)
            session.terminate()
            continue
        plain = ask(session, question)
        shown = stop.router()
        session.terminate()

        count = len(stop.tokens)
        assert plain.first_token == stop.tokens[0].position
        assert plain.logits.shape == (count, 4) and plain.experts.shape == (count, 2)
        assert len(shown) == 2 * count
        best = plain.logits.numpy().argmax(1)
        assert (shown[shown["rank"] == 1].expert.to_numpy() == best).all()
        for site, seen in (("middle", True), ("mlp.output", False)):
            session, stop = stopped_at(local, prompt, f"layers.{layer}.{site}", forward)
            stop.edit(scale=-1.5)
            edited = stop.router()
            assert (not edited.equals(shown)) is seen, (site, forward)
            session.terminate()


# --- asking ---------------------------------------------------------------------------------------


def ask(session: Session, message: Any) -> Any:
    return session.client.call(message, object)


def summary(stop: Stopped) -> m.Summary:
    message = m.ReadValue(session_id=stop.session.id, seen=stop.number)
    found: m.Summary = ask(stop.session, message)
    return found


def session_logits(session: Session) -> np.ndarray[Any, Any]:
    """Logits at which the session stands."""
    stop = Stopped(session, session.refresh())
    assert stop.location == "logits"
    return stop.value.numpy()[0]


def tensor(local: Local, session: Session, reply: m.TensorReply) -> np.ndarray[Any, Any]:
    """The elements of a tensor reply, fetched in pieces when it did not come inside."""
    if reply.data is not None:
        return np.asarray(reply.data.numpy())
    assert reply.transfer_id is not None
    pieces = list(_pieces(session, reply))
    whole = m.parts.Array(reply.dtype, reply.shape, b"".join(pieces))
    return np.asarray(whole.numpy())


def _pieces(session: Session, reply: m.TensorReply) -> Iterator[bytes]:
    offset, step = 0, 1 << 18
    while offset < reply.nbytes:
        length = min(step, reply.nbytes - offset)
        message = m.ReadChunk(transfer_id=reply.transfer_id or "", offset=offset, length=length)
        yield bytes(ask(session, message).data.data)
        offset += length


def names(local: Local) -> list[str]:
    """Every location of a forward, in order."""
    points: list[float] = [0]
    for layer in range(local.num_layers):
        points += [layer + (1 + INNER_SITES.index(s)) / 16 for s in sites_of(local, layer)]
        points.append(layer + 1)
    return [str(location_at(point, local.num_layers)) for point in points]
