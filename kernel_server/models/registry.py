"""From what a user names to a model in memory, with what must be said about it.

Decides dtype and device defaults and what describes a model; reading folders is `weights`' work,
making random weights `geometry`'s.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kernel_server.models import weights
from kernel_server.models.anatomy import text_config
from kernel_server.models.geometry import Progress, geometry_config, random_model
from kernel_server.protocol.errors import BadArgument, OutOfDeviceMemory

#: The folder of the model that ships with the package.
BUNDLED = Path(__file__).parent / "bundled" / "weights"

#: Where configurations say how many positions there are; MPT's is the second.
_CONTEXT_FIELDS = ("max_position_embeddings", "max_seq_len")

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A stock model in memory and what is known of it.

    weights_hash: of the files' bytes; of configuration, seed and a sample for random weights.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    random_weights: bool
    weights_hash: str
    dtype: torch.dtype
    device: torch.device


def open_model(
    source: str | None = None,
    *,
    geometry: str | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a model by folder or hub id, make one at a known geometry, or take the bundled one.

    dtype: `float32`, `bfloat16` or `float16`; without it float32 on the CPU, and on a GPU what the
    configuration says. device: `cpu`, `cuda:0`; without it the first GPU, else the CPU.

    Raises ModelNotFound, BrokenModel, UnsupportedModel, BadArgument or OutOfDeviceMemory.

    >>> loaded = open_model(geometry="gpt2", device="cpu")  # doctest: +SKIP
    """
    if source is not None and geometry is not None:
        raise BadArgument("give a model or a geometry, not both")
    where = choose_device(device)
    try:
        if geometry is not None:
            config = geometry_config(geometry)
            kind = choose_dtype(dtype, where, config)
            model = random_model(config, seed, kind, where, progress)
            return LoadedModel(model, None, geometry, True, _hash_random(model, seed), kind, where)
        folder = BUNDLED
        if source is not None:
            folder = weights.find_folder(source, trust_remote_code=trust_remote_code)
        return _open_folder(folder, source, dtype, where, trust_remote_code, progress)
    except torch.OutOfMemoryError as error:
        raise OutOfDeviceMemory(
            f"the weights do not fit on {where}: choose a smaller model, bfloat16, or another"
            " device"
        ) from error


def _open_folder(
    folder: Path,
    source: str | None,
    dtype: str | None,
    where: torch.device,
    trust_remote_code: bool,
    progress: Progress | None,
) -> LoadedModel:
    config = weights.read_config(folder, trust_remote_code=trust_remote_code)
    weights.refuse_unless_decoder(config)
    files = weights.weight_files(folder)
    kind = choose_dtype(dtype, where, config)
    tokenizer = weights.read_tokenizer(folder, trust_remote_code=trust_remote_code)
    # Read through once for the hash: the second reading comes from the page cache.
    digest = weights.hash_files([*files, folder / "config.json"], progress)
    model = weights.read_model(folder, config, kind, where, trust_remote_code=trust_remote_code)
    name = "bundled" if source is None else source.rstrip("/").split("/")[-1]
    return LoadedModel(model, tokenizer, name, False, digest, kind, where)


def choose_device(device: str | None) -> torch.device:
    """The device of this name, checked to be there; the first GPU, else the CPU, for None."""
    if device is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise BadArgument(f"unknown device {device!r}: use cpu, cuda or cuda:0") from None
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = chosen.index or 0
        if index >= count:
            raise BadArgument(f"there is no device {device}: torch sees {count} GPUs here")
        return torch.device("cuda", index)
    if chosen.type != "cpu":
        raise BadArgument(f"unknown device {device!r}: use cpu, cuda or cuda:0")
    return chosen


def choose_dtype(dtype: str | None, device: torch.device, config: PretrainedConfig) -> torch.dtype:
    """The dtype of this name; without one float32 on the CPU, else the configuration's own."""
    if dtype is not None:
        if dtype not in _DTYPES:
            raise BadArgument(f"unknown dtype {dtype!r}: use float32, bfloat16 or float16")
        return _DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    own = getattr(config, "dtype", None)
    if isinstance(own, str):
        own = _DTYPES.get(own)
    return own if isinstance(own, torch.dtype) and own in _DTYPES.values() else torch.bfloat16


def _hash_random(model: PreTrainedModel, seed: int) -> str:
    """Configuration, seed, and a few numbers of every tensor, so that another generator shows."""
    digest = hashlib.blake2b(digest_size=16)
    config = model.config.to_dict()
    config.pop("transformers_version", None)
    digest.update(json.dumps([config, seed], sort_keys=True, default=str).encode())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            sample = parameter.flatten()[:: max(1, parameter.numel() // 8)][:8]
            digest.update(name.encode() + sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Ids that end a generation, of the generation configuration, else of the model's."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = getattr(text_config(model), "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)


def max_context(model: PreTrainedModel) -> int:
    """Tokens a session may have: what the configuration says, else a million."""
    config = text_config(model)
    named = [getattr(config, name, None) for name in _CONTEXT_FIELDS]
    most = next((int(number) for number in named if number), 1 << 20)
    for name, module in model.named_modules():
        # Tables that count positions from behind a padding row have fewer than rows.
        if (
            isinstance(module, nn.Embedding)
            and "position" in name
            and module.padding_idx is not None
            and module.num_embeddings <= most
        ):
            return module.num_embeddings - module.padding_idx - 1
    return most


def describe_config(model: PreTrainedModel) -> dict[str, Any]:
    """The configuration as plain values, without what Djinn set in it."""
    config = json.loads(json.dumps(model.config.to_dict(), default=str))
    config.pop("_attn_implementation", None)
    assert isinstance(config, dict)
    return config


def module_tree(model: PreTrainedModel) -> tuple[tuple[str, str, str], ...]:
    """(path, class, parameter shapes) of every module, in the model's order; no weights."""
    rows = []
    for path, module in model.named_modules():
        shapes = ", ".join(
            f"{name} {list(parameter.shape)}"
            for name, parameter in module._parameters.items()
            if parameter is not None
        )
        rows.append((path, type(module).__name__, shapes))
    return tuple(rows)
