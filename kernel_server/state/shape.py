"""The numbers decisions rest on: the model's sizes, the page pool, and the limits of an owner."""

from __future__ import annotations

from dataclasses import dataclass

from kernel_server.protocol.location import logits_point, sampled_point


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of the model served and of its page pool."""

    num_layers: int
    hidden_size: int
    #: width of `final_norm`
    norm_size: int
    vocab_size: int
    #: layers whose keys and values share a page: a page group
    layers_per_group: int
    #: tokens in a page
    page_tokens: int
    num_pages: int
    page_bytes: int
    max_context: int
    eos_token_ids: tuple[int, ...] = ()
    #: tokens of a prompt that pass a layer together
    prefill_chunk: int = 512

    @property
    def num_groups(self) -> int:
        return -(-self.num_layers // self.layers_per_group)

    @property
    def logits(self) -> int:
        """The point of the logits."""
        return logits_point(self.num_layers)

    @property
    def sampled(self) -> int:
        """One past the last stop: the forward's token is drawn."""
        return sampled_point(self.num_layers)

    def width(self, point: int) -> int:
        """Channels of the tensor at a point."""
        if point == self.logits:
            return self.vocab_size
        return self.norm_size if point > self.num_layers else self.hidden_size

    def pages_for(self, num_tokens: int) -> int:
        """Pages of one group that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_tokens)

    def groups_begun(self, num_layers: int) -> int:
        """Groups of which at least one of the first `num_layers` layers is part."""
        return -(-num_layers // self.layers_per_group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one owner, and one session, may hold."""

    sessions_per_owner: int = 64
    #: KV pages of one owner's sessions, bytes; None: as many as there are
    kv_bytes_per_owner: int | None = None
    #: values of one owner's edits, bytes
    edit_bytes_per_owner: int = 1 << 30
    #: what one owner's captures and logs may hold, bytes
    capture_bytes_per_owner: int = 4 << 30
    breakpoints_per_session: int = 256
    edits_per_session: int = 256
    #: requests that wait while edits are being applied
    deferred_per_session: int = 64
    name_length: int = 200
    #: a prefill beside which others wait is handed over after this many (chunk, layer) steps
    prefill_slice: int = 8
    #: entries of a session's story that are kept
    story_entries: int = 1000
