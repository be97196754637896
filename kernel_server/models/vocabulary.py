"""What each token id reads as, its leading space included. Lazy: nothing is built until asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kernel_server.protocol.errors import BadPrompt


class Vocabulary:
    """The text of every token id, for byte-level BPE and sentencepiece tokenizers alike.

    tokenizer: of transformers, or None for a model without one; then every text is empty.

    >>> Vocabulary(None).text(17)
    ''
    """

    def __init__(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._ids: dict[str, tuple[int, ...]] | None = None
        self._anchor: tuple[int, str] | None = None
        self.size = vocab_size or (0 if tokenizer is None else len(tokenizer))

    def text(self, token_id: int) -> str:
        """The text of one id as it stands in the middle of a text: `" to"`."""
        if self.tokenizer is None:
            return ""
        found = self._texts.get(token_id)
        if found is None:
            found = self._texts[token_id] = self._decode_after_anchor(token_id)
        return found

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, as the model's tokenizer makes them."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer says how a conversation is written for its model."""
        return self.tokenizer is not None and bool(getattr(self.tokenizer, "chat_template", None))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's own template, ready for its next turn.

        messages: each a `role` and `content`. One of the assistant at the end is gone on with
        instead. Raises BadPrompt with what the template says of messages it cannot take.
        """
        unfinished = messages[-1]["role"] == "assistant"
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(one) for one in messages],
                tokenize=False,
                add_generation_prompt=not unfinished,
                continue_final_message=unfinished,
            )
        # a template is a program of the model's maker, which raises what it likes
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise BadPrompt(
                f"the model's chat template refuses these {len(messages)} messages: {reason}"
            ) from error
        # the template writes the special tokens itself
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids together, as a reader reads it: without special tokens."""
        text: str = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def ids(self, text: str) -> tuple[int, ...]:
        """Every id that reads as `text`; decodes the whole vocabulary once."""
        return self._table().get(text, ())

    def all_texts(self) -> list[str]:
        """Every text that some id reads as."""
        return list(self._table())

    def _table(self) -> dict[str, tuple[int, ...]]:
        if self._ids is None:
            table: dict[str, list[int]] = {}
            for token_id in range(self.size):
                table.setdefault(self.text(token_id), []).append(token_id)
            self._ids = {text: tuple(ids) for text, ids in table.items()}
        return self._ids

    def _decode_after_anchor(self, token_id: int) -> str:
        # Sentencepiece drops the space of the first token of a text, so one is put before it.
        if self._anchor is None:
            self._anchor = self._find_anchor()
        anchor, before = self._anchor
        if not 0 <= token_id < len(self.tokenizer):
            return ""
        both = self._decode([anchor, token_id])
        return both[len(before) :] if both.startswith(before) else self._decode([token_id])

    def _find_anchor(self) -> tuple[int, str]:
        for candidate in self.tokenizer.encode("a b c", add_special_tokens=False):
            text = self._decode([candidate])
            if text.strip():
                return candidate, text
        return 0, self._decode([0])

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text
