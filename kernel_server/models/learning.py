"""What must be found out about a family before its layers may be called one by one.

Every question is put to the model itself, with a few tokens; what it answers is kept in the
`ResumableModel`, and an answer that rules out exact stops refuses the model by name. Whether the
results are right is not decided here but by the load check, against stock transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernel_server.models.recording import (
    AxesNotFound,
    Call,
    Recording,
    call_axes,
    call_leaves,
    leaves,
    pair_bytes,
    same_call,
    same_value,
    token_bytes,
)
from kernel_server.models.site_learning import learn_sites

if TYPE_CHECKING:
    from kernel_server.models.resumable import LayerObserver, ResumableModel

#: Token counts and the offset of the recordings from which the token axes are learnt. Unequal to
#: each other, so that an axis of keys (offset + tokens) cannot be taken for one of queries.
_SHORT, _LONG, _LATER = 5, 7, 3


def learn(model: ResumableModel, observer: LayerObserver) -> None:
    """Learn layer outputs, token axes and the preamble of `model`; refuse what cannot be exact."""
    ids, positions = model.inputs(model.sample_ids(_SHORT), 0)
    ran = _run_layers(model, observer, ids, positions)
    recorded = model.record(ids, positions)
    _check_calls(model, ran, recorded)
    _learn_axes(model, recorded)
    _check_memory(model, recorded)
    _learn_preamble(model, recorded)
    model.sites = learn_sites(model, observer)


def _run_layers(
    model: ResumableModel, observer: LayerObserver, ids: Tensor, positions: Tensor
) -> Recording:
    """Run every layer once under observation: its output's form, its inputs left untouched."""

    def step(index: int, hidden: Tensor, call: Call) -> Tensor:
        if hidden.dim() != 3 or hidden.shape[:2] != ids.shape:
            model.refuse(
                f"its residual stream has shape {list(hidden.shape)} for {ids.shape[1]} tokens,"
                " not [1, tokens, hidden]",
                "residual stream",
            )
        before, version = hidden.clone(), hidden._version
        observer.enter(index)
        output = model.call_layer(index, hidden, call)
        observer.check(index)
        if hidden._version != version or not torch.equal(hidden, before):
            model.refuse(
                f"layer {index} changes its input in place, so a stop before it could not be kept",
                "in-place layers",
            )
        if not isinstance(output, Tensor) or output.shape != hidden.shape:
            model.refuse(f"layer {index} returns no residual stream", "layer outputs")
        if output.dtype != hidden.dtype or output.data_ptr() == hidden.data_ptr():
            model.refuse(
                f"layer {index} returns its own input or another dtype ({output.dtype})",
                "layer outputs",
            )
        return output

    recording, final = model.forward(ids, positions, step)
    if final is None or len(recording.calls) != model.num_layers:
        model.refuse(
            f"its forward calls {len(recording.calls)} of its {model.num_layers} layers", "layers"
        )
    return recording


def _check_calls(model: ResumableModel, ran: Recording, recorded: Recording) -> None:
    """The arguments of a layer must not depend on what the layers before it computed."""
    if len(recorded.calls) != model.num_layers:
        model.refuse("its layers cannot be recorded without running them", "layer loop")
    assert ran.embedding is not None and recorded.embedding is not None
    if not torch.equal(ran.embedding, recorded.embedding):
        model.refuse("the same ids gave two embeddings", "preamble")
    for index, (first, second) in enumerate(zip(ran.calls, recorded.calls, strict=True)):
        if not same_call(first, second):
            model.refuse(
                f"layer {index} is called with something earlier layers computed (shared keys and"
                " values, or other state between layers)",
                "state between layers",
            )
        for path, value in call_leaves(first).items():
            if value is model.cache and value is not None:
                continue
            if isinstance(value, Mapping) and not value:
                continue  # for what layers hand on to later ones, and these hand on nothing
            if not isinstance(value, (Tensor, nn.Module, str, int, float, bool, type(None))):
                kind = type(value).__name__
                model.refuse(
                    f"layer {index} is handed an object of type {kind} ({path})",
                    "layer arguments",
                )


def _learn_axes(model: ResumableModel, short: Recording) -> None:
    long = model.record(*model.inputs(model.sample_ids(_LONG), 0))
    later = model.record(*model.inputs(model.sample_ids(_SHORT), _LATER))
    axes = []
    for index in range(model.num_layers):
        try:
            axes.append(
                call_axes(
                    short.calls[index],
                    long.calls[index],
                    later.calls[index],
                    (_SHORT, _LONG),
                    _LATER,
                )
            )
        except AxesNotFound as error:
            model.refuse(f"{error}, so long prompts cannot be cut into chunks", "layer arguments")
    model.axes = axes
    model.pair_bytes = pair_bytes(later.calls, axes)
    model.token_bytes = token_bytes(long, model.weights)


def _check_memory(model: ResumableModel, before: Recording) -> None:
    """Refuse a preamble that remembers longer prompts, as dynamic rotary scaling does.

    The same ids are recorded before and after ids further on, within and beyond the length the
    model was made for: some scalings forget again once a short prompt comes.
    """
    reach = int(getattr(model.config, "max_position_embeddings", 0) or 0)
    starts = [0, max(reach - 4 - _SHORT, 0)]
    if _has_rotary(model) and not _has_learnt_positions(model, before):
        # A table of positions has an end; what is a formula is tried beyond it.
        starts = [0, max(reach, 4096) + 64, 4 * max(reach, 4096)]
    for index, near in enumerate(starts):
        first = model.record(*model.inputs(model.sample_ids(_SHORT), near))
        for far in starts[index + 1 :]:
            model.record(*model.inputs(model.sample_ids(_SHORT, seed=1), far))
            again = model.record(first.token_ids, first.positions)
            if not all(map(same_call, first.calls, again.calls)):
                model.refuse(
                    "its rotary positions depend on longer prompts seen earlier (dynamic rotary"
                    " scaling), so a session could not be replayed exactly",
                    "dynamic RoPE",
                    "set another rope_type in the configuration, such as 'linear' or 'yarn'",
                )


def _has_rotary(model: ResumableModel) -> bool:
    return any(
        name.endswith("inv_freq") for module in model.model.modules() for name in module._buffers
    )


def _has_learnt_positions(model: ResumableModel, recording: Recording) -> bool:
    """Whether the preamble looks positions up in a table (an embedding fed something else)."""
    found = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        fed = [value for _, value in leaves((args, kwargs)) if isinstance(value, Tensor)]
        if not any(same_value(value, recording.token_ids) for value in fed):
            found.append(module)

    tables = [m for m in model.model.modules() if isinstance(m, nn.Embedding)]
    hooks = [table.register_forward_hook(note, with_kwargs=True) for table in tables]
    try:
        model.record(recording.token_ids, recording.positions)
    finally:
        for hook in hooks:
            hook.remove()
    return bool(found)


def _learn_preamble(model: ResumableModel, recording: Recording) -> None:
    """Let the norm part play back what the preamble computed, where that gives the same bits."""
    assert recording.embedding is not None
    hidden = recording.embedding
    ids, positions = recording.token_ids, recording.positions
    plain = model.norm(hidden, ids, positions)
    if not torch.equal(plain, model.norm(hidden.clone(), ids, positions)):
        model.refuse("its final norm gives two results for one input", "final norm")
    paths = _modules_before_layers(model, recording)
    model.replay_preamble(paths)
    played_from = model.record(ids, positions)
    try:
        same = torch.equal(plain, model.norm(hidden, ids, positions, played_from))
    except (StopIteration, KeyError, TypeError, AttributeError):
        same = False
    if not same:
        model.replay_preamble(())


def _modules_before_layers(model: ResumableModel, recording: Recording) -> list[str]:
    """Paths of the base model's children that a preamble calls and the norm part does not need."""
    entry = model.entry_path
    called: dict[str, None] = {}
    chain = [path for path in model.anatomy.chain if path.startswith(entry)]
    hooks = []
    for owner in chain:
        for name, child in model.model.get_submodule(owner)._modules.items():
            path = f"{owner}.{name}"
            if child is None or path in chain or path == model.anatomy.layers_path:
                continue

            def note(*_: Any, path: str = path) -> None:
                called[path] = None

            hooks.append(child.register_forward_hook(note))
    try:
        model.record(recording.token_ids, recording.positions)
    finally:
        for hook in hooks:
            hook.remove()
    return list(called)
