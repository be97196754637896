"""Where a mixture of experts chooses: the router of a layer, found and read by what it returns.

A router is the module that returns, for every token, its logits over the experts, the experts
chosen and their weights. Families that return these in another form have none here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kernel_server.models.recording import leaves
from kernel_server.models.sites import SiteReached


@dataclass(frozen=True, slots=True)
class RouterReading:
    """What a router decided: logits [tokens, experts], experts and weights [tokens, chosen].

    The weights are those that the experts' results are multiplied with.
    """

    logits: Tensor
    experts: Tensor
    weights: Tensor


def read_router(output: Any, tokens: int) -> RouterReading | None:
    """The reading in a module's output for `tokens` tokens, None if it holds no such thing."""
    if not isinstance(output, (tuple, list)) or len(output) < 3:
        return None
    found = [value for _, value in leaves(output) if isinstance(value, Tensor)]
    if len(found) != len(output) or any(t.dim() != 2 or t.shape[0] != tokens for t in found):
        return None
    chosen = [t for t in found if not t.is_floating_point()]
    if len(chosen) != 1:
        return None
    count = chosen[0].shape[1]
    floats = [t for t in found if t.is_floating_point()]
    weights = [t for t in floats[1:] if t.shape[1] == count]
    if len(weights) != 1 or floats[0].shape[1] < count:
        return None
    return RouterReading(floats[0], chosen[0], weights[0])


@contextlib.contextmanager
def finding_routers(layer: nn.Module, tokens: int) -> Iterator[list[nn.Module]]:
    """Collects the routers among the modules of `layer` that run meanwhile."""
    found: list[nn.Module] = []

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if read_router(output, tokens) is not None:
            found.append(module)

    with _hooked(list(layer.modules()), note):
        yield found


@contextlib.contextmanager
def reading_router(router: nn.Module, tokens: int) -> Iterator[list[RouterReading]]:
    """Collects what `router` decides in the layer run meanwhile, which ends there."""
    taken: list[RouterReading] = []

    def take(_: nn.Module, __: Any, output: Any) -> None:
        reading = read_router(output, tokens)
        if reading is not None:
            taken.append(reading)
            raise SiteReached

    with _hooked([router], take):
        yield taken


@contextlib.contextmanager
def _hooked(modules: list[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
