"""Model folders: found, checked and read. Safetensors only; nothing of a pickle is ever opened.

Says by name what is wrong with a folder before torch sees it, and hashes what it reads. Whether
the model can be stopped exactly is decided later, by the load check.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from kernel_server.models.altered import refuse_adapter, refuse_quantised
from kernel_server.models.geometry import Progress
from kernel_server.protocol.errors import BrokenModel, ModelNotFound, UnsupportedModel

_READ_BYTES = 8 << 20
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
#: What is fetched of a hub repository; remote code only on request.
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def find_folder(source: str, *, trust_remote_code: bool = False) -> Path:
    """The local folder of a model: a path, or a hub id that is fetched if it is not here yet.

    Raises ModelNotFound.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelNotFound(f"{source} is a file: give the folder that holds config.json")
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ModelNotFound(f"there is no folder {source}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_HUB_PATTERNS, "*.py"] if trust_remote_code else _HUB_PATTERNS
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFound(
            f"{source!r} is neither a local folder nor a hub id that could be fetched"
            f" ({type(error).__name__}): check the name and the network"
        ) from error


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration; BrokenModel or UnsupportedModel says what is wrong with it."""
    refuse_adapter(folder)
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BrokenModel(f"{folder} has no config.json: is it a model folder?") from None
    except (ValueError, OSError) as error:
        raise BrokenModel(f"{file} cannot be read as JSON: {_first_line(error)}") from error
    if not isinstance(raw, dict) or not raw.get("model_type"):
        raise BrokenModel(f"{file} names no model_type")
    _refuse_kinds(raw)
    if "auto_map" in raw and not trust_remote_code:
        known = AutoConfig
        try:
            return known.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except ValueError as error:
            raise UnsupportedModel(
                f"{raw['model_type']}: the folder brings its own model code, which is not run;"
                " start the server with --trust-remote-code if you trust it",
                feature="remote code",
            ) from error
    try:
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"{raw['model_type']}: this version of transformers cannot read the configuration"
            f" ({_first_line(error)})",
            feature="model type",
        ) from error
    except Exception as error:
        raise BrokenModel(f"{file}: {type(error).__name__}: {_first_line(error)}") from error


def _refuse_kinds(raw: dict[str, Any]) -> None:
    kind = raw["model_type"]
    if raw.get("is_encoder_decoder"):
        raise UnsupportedModel(
            f"{kind}: encoder-decoder models are not supported; use a decoder-only one",
            family=kind,
            feature="encoder-decoder",
        )
    refuse_quantised(raw)


def refuse_unless_decoder(config: PretrainedConfig) -> None:
    """Raise UnsupportedModel unless the configuration is that of a decoder-only language model."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        _refuse_kinds({"model_type": kind, "is_encoder_decoder": True})
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        raise UnsupportedModel(
            f"{kind}: an encoder-only model, whose tokens see later ones, has no generation to"
            " stop; use a decoder-only model",
            family=kind,
            feature="encoder-only",
        )
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise UnsupportedModel(
            f"{kind}: not a causal language model of transformers; use a decoder-only one",
            family=kind,
            feature="not a causal LM",
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model, checked to be there and readable; or BrokenModel."""
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BrokenModel(f"{index} is not an index of weights: {_first_line(error)}") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise BrokenModel(
                f"{folder} lacks {len(missing)} of {len(names)} weight files, first {missing[0]}:"
                " fetch the model again",
                missing=missing,
            )
        files = [folder / name for name in names]
    elif (folder / _SINGLE).is_file():
        files = [folder / _SINGLE]
    elif pickles := sorted(folder.glob("pytorch_model*.bin")):
        raise UnsupportedModel(
            f"{folder} holds only pickled weights ({pickles[0].name}), which are never opened;"
            " convert them to safetensors",
            feature="pickled weights",
        )
    else:
        raise BrokenModel(f"{folder} has no weights: {_SINGLE} or {_INDEX} is missing")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise BrokenModel(
                f"{file.name} is damaged ({_first_line(error)}): fetch the model again"
            ) from error
    return files


def hash_files(files: Sequence[Path], progress: Progress | None = None) -> str:
    """BLAKE2b over the bytes of the files, in order of their names."""
    total = sum(file.stat().st_size for file in files)
    done = 0

    def note(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, total), total, "reading weights")

    ordered = sorted(files, key=lambda file: file.name)
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(lambda file: _hash_file(file, note), ordered))
    whole = hashlib.blake2b(digest_size=16)
    for file, digest in zip(ordered, digests, strict=True):
        whole.update(file.name.encode() + b"\0" + digest)
    return whole.hexdigest()


def _hash_file(file: Path, note: Callable[[int], None]) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    with file.open("rb") as opened:
        while data := opened.read(_READ_BYTES):
            digest.update(data)
            note(len(data))
    return digest.digest()


def read_model(
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The stock model with its weights, in eval mode on the device; BrokenModel if some lack."""
    # The server shows progress of its own.
    transformers_logging.disable_progress_bar()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise BrokenModel(
            f"the weights in {folder} do not fit the configuration: {_first_line(error)}"
        ) from error
    missing = sorted(loading.get("missing_keys", ()))
    if missing:
        raise BrokenModel(
            f"{folder} lacks {len(missing)} weights, first {missing[0]}: fetch the model again",
            missing=missing[:20],
        )
    if mismatched := loading.get("mismatched_keys"):
        raise BrokenModel(
            f"{len(mismatched)} weights in {folder} have another shape than the configuration says"
        )
    return model.to(device).eval()


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, None if it has none; BrokenModel if it cannot be read."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise BrokenModel(
            f"the tokenizer in {folder} cannot be read: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
