"""Where a stock model keeps its layers, and shallow views of it. Decides no arithmetic.

A *view* is a copy of a few module objects that shares every parameter with the stock model: the
stock module tree itself is never changed, so a hook that someone put on a stock layer fires when
that layer runs, and the stock model can be taken apart by several views at once.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kernel_server.protocol.errors import UnsupportedModel

#: Slots of nn.Module that hold hooks; a stock twin starts without any.
_HOOK_SLOTS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True)
class Anatomy:
    """The decoder layers of a model and the modules on the way to them.

    owner_path: dotted path of the module that owns the list, `""` for the model itself.
    attribute: the list's name in its owner.
    """

    owner_path: str
    attribute: str
    layers: tuple[nn.Module, ...]

    @property
    def chain(self) -> tuple[str, ...]:
        """Paths from the model's child down to the owner: `("model", "model.decoder")`."""
        parts = self.owner_path.split(".") if self.owner_path else []
        return tuple(".".join(parts[: n + 1]) for n in range(len(parts)))

    @property
    def layers_path(self) -> str:
        """Dotted path of the layer list."""
        return f"{self.owner_path}.{self.attribute}" if self.owner_path else self.attribute


def family(model: PreTrainedModel) -> str:
    """The model's family as its configuration names it: `llama`."""
    return str(getattr(model.config, "model_type", type(model).__name__))


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The configuration of the decoder, also inside a composite one."""
    return model.config.get_text_config(decoder=True)


def find_layers(model: PreTrainedModel) -> Anatomy:
    """Find the list of decoder layers: as long as the configuration says, and the heaviest such.

    Raises UnsupportedModel if no list of that length exists.
    """
    count = getattr(text_config(model), "num_hidden_layers", None)
    best: tuple[int, Anatomy] | None = None
    for path, module in model.named_modules():
        for name, child in module._modules.items():
            if not isinstance(child, nn.ModuleList) or len(child) != count:
                continue
            weight = sum(parameter.numel() for parameter in child.parameters())
            if best is None or weight > best[0]:
                best = weight, Anatomy(path, name, tuple(child))
    if best is None or not best[1].owner_path:
        raise UnsupportedModel(
            f"{family(model)}: found no list of {count} decoder layers inside the base model;"
            " use a decoder-only transformer",
            family=family(model),
            feature="layer list",
        )
    return best[1]


def shallow_copy(module: nn.Module) -> nn.Module:
    """A copy of one module object whose children can be replaced; everything else is shared."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


def view(root: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow view of `root` with the modules at some dotted paths replaced.

    replacements: dotted path -> module to stand there; the path must exist.
    """
    twin = shallow_copy(root)
    copied = {"": twin}
    for path in sorted(replacements, key=lambda path: path.count(".")):
        parts = path.split(".")
        for depth in range(1, len(parts)):
            inner, outer = ".".join(parts[:depth]), ".".join(parts[: depth - 1])
            if inner not in copied:
                original = copied[outer]._modules[parts[depth - 1]]
                assert original is not None
                copied[inner] = shallow_copy(original)
                copied[outer]._modules[parts[depth - 1]] = copied[inner]
        copied[".".join(parts[:-1])]._modules[parts[-1]] = replacements[path]
        copied[path] = replacements[path]
    return twin


class StandIn(nn.Module):
    """Takes a module's place in a view and looks like it: unknown attributes are the module's."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        # Not a submodule: the view must not list its parameters twice.
        self.__dict__["_real"] = [real]

    @property
    def real(self) -> nn.Module:
        """The stock module."""
        module: nn.Module = self.__dict__["_real"][0]
        return module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_real"][0], name)

    def __len__(self) -> int:
        return len(self.real)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.real)  # type: ignore[call-overload]

    def __getitem__(self, key: Any) -> Any:
        return self.real[key]  # type: ignore[index]


def configs_of(model: nn.Module) -> list[PretrainedConfig]:
    """Every configuration object that a module of the model holds, each once."""
    found: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, PretrainedConfig):
                found.setdefault(id(value), value)
    return list(found.values())


def twin_with_configs(model: nn.Module, configs: Mapping[int, PretrainedConfig]) -> nn.Module:
    """The whole model again with other configurations, sharing parameters; hooks stay behind.

    configs: id of a configuration object in `model` -> the one the twin holds instead.
    """
    twins: dict[int, nn.Module] = {}

    def twin(module: nn.Module) -> nn.Module:
        if id(module) in twins:
            return twins[id(module)]
        made = twins[id(module)] = copy.copy(module)
        state = made.__dict__
        for slot in _HOOK_SLOTS:
            if slot in state:
                state[slot] = OrderedDict()
        # Buffers are re-registered by some rotary modules: the twin keeps its own table of them.
        state["_buffers"] = dict(module._buffers)
        for name, value in list(state.items()):
            if isinstance(value, PretrainedConfig):
                state[name] = configs[id(value)]
        state["_modules"] = {
            name: None if child is None else twin(child) for name, child in module._modules.items()
        }
        return made

    return twin(model)
