"""What is known of the model served: sizes, config, modules, tokenizer. No weights come here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from djinn_nb import sites
from djinn_nb.checks import flag, shown, whole
from djinn_nb.selectors import plain_array
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadArgument, NoTokenizer

if TYPE_CHECKING:
    import pandas as pd

    from djinn_nb.client import Client


class Model:
    """The model a server has loaded.

    server.model.num_layers, server.model.config["vocab_size"]
    server.model.tokenizer.encode("When Mary and John")
    server.model.modules
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def info(self) -> m.ModelInfo:
        """All that the server says of it."""
        return self._client.model

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def architecture(self) -> str:
        """Its class in transformers."""
        return self.info.architecture

    @property
    def random_weights(self) -> bool:
        """True when its weights were never trained."""
        return self.info.random_weights

    @property
    def num_layers(self) -> int:
        return self.info.num_layers

    @property
    def hidden_size(self) -> int:
        return self.info.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.info.vocab_size

    @property
    def max_context(self) -> int:
        """Most tokens a session may have, prompt included."""
        return self.info.max_context

    @property
    def max_prompt(self) -> int:
        """Most tokens of a prompt: fewer where attention keeps a mask of the whole prompt."""
        limit = self.info.max_prompt
        return self.max_context if limit is None else min(limit, self.max_context)

    @property
    def num_parameters(self) -> int:
        return self.info.num_parameters

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def device(self) -> str:
        return self.info.device

    @property
    def config(self) -> dict[str, Any]:
        """Its configuration, by Hugging Face's names."""
        return dict(self.info.config)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides its numbers bit for bit: weights, versions, device, chunk, threads."""
        return dict(self.info.fingerprint)

    @property
    def load_check(self) -> dict[str, Any]:
        """How it compared with stock transformers when it was loaded."""
        return dict(self.info.load_check)

    @property
    def locations(self) -> list[str]:
        """Every name a stop can have with this model, in the order of a forward."""
        return sites.locations(self.info)

    @property
    def sites(self) -> pd.DataFrame:
        """What can be stopped at, seen and edited inside each layer, and why a site is off.

        One row per (layer, site): heads, width of the last axis ("keys": one for each key), and
        off (why; empty where it works).
        """
        return sites.frame(self.info)

    @property
    def modules(self) -> Modules:
        """Its module tree with parameter shapes."""
        return Modules(self.info.modules)

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, on the server. Raises NoTokenizer when it has none."""
        if not self.info.has_tokenizer:
            raise NoTokenizer(f"{self.info.name} has no tokenizer: prompts are lists of token ids")
        return Tokenizer(self._client)

    def __repr__(self) -> str:
        return model_line(self.info)


class Tokenizer:
    """Text to token ids and back, computed on the server."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, as `launch` would make them."""
        if not isinstance(text, str):
            raise BadArgument(f"encode takes a text, not {type(text).__name__}")
        special = flag(add_special_tokens, "add_special_tokens")
        message = m.Tokenize(text=text, add_special_tokens=special)
        return list(self._client.call(message, m.TokenIds).token_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids together, without special tokens."""
        return self._client.text_of(token_id_list(token_ids))

    def tokens(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token id, with its leading space."""
        return self._client.token_texts(token_id_list(token_ids))

    def __repr__(self) -> str:
        return f"Tokenizer of {self._client.model.name} (.encode, .decode, .tokens)"


class Modules(Mapping[str, str]):
    """The module tree: path → parameter shapes; prints as a tree."""

    def __init__(self, rows: tuple[tuple[str, str, str], ...]) -> None:
        self._rows = rows
        self._shapes = {path: shapes for path, _, shapes in rows}

    def __getitem__(self, path: str) -> str:
        return self._shapes[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __repr__(self) -> str:
        lines = []
        for path, kind, shapes in self._rows:
            depth = path.count(".") + 1 if path else 0
            name = path.rpartition(".")[2]
            label = f"({name}) {kind}" if name else kind
            lines.append("  " * depth + label + (f"  {shapes}" if shapes else ""))
        return "\n".join(lines)


def token_id_list(token_ids: object) -> list[int]:
    """Token ids as plain integers, from any sequence, array or tensor, or BadArgument."""
    found = plain_array(token_ids)
    if isinstance(found, np.ndarray) and found.ndim == 1:
        found = found.tolist()
    # bytes are texts to most people, and a set has no order
    if isinstance(found, (str, bytes, bytearray)) or not isinstance(found, Sequence):
        raise BadArgument(f"token ids are a list of integers, not {shown(token_ids)}")
    return [whole(i, f"token id {index}") for index, i in enumerate(found)]


def model_line(info: m.ModelInfo) -> str:
    """The model in one line."""
    random = " · random weights" if info.random_weights else ""
    return (
        f"{info.name} ({info.architecture}){random} · {info.num_layers} layers ·"
        f" hidden {info.hidden_size} · vocabulary {info.vocab_size} ·"
        f" {info.num_parameters / 1e6:.4g} M parameters · {info.dtype} on {info.device}"
    )
