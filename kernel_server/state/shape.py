"""The numbers decisions rest on: the model's sizes, the page pool, and the limits of an owner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kernel_server.protocol.errors import NotSupported
from kernel_server.protocol.location import (
    Point,
    is_inner,
    layer_of,
    logits_point,
    parse_location,
    sampled_point,
    site_of,
)
from kernel_server.protocol.messages import SiteLayout


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
    #: most tokens of a prompt where masks of the whole prompt bound it
    max_prompt: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    #: tokens of a prompt that pass a layer together
    prefill_chunk: int = 512
    #: bytes of one number of the residual stream
    element_bytes: int = 4
    #: of what is recorded of a forward's calls: bytes per token; likewise of the embedding, which
    #: one token keeps and a prompt does not; bytes per pair of tokens (masks), and up to how many
    #: those stay
    recorded_token_bytes: int = 0
    embedded_token_bytes: int = 0
    pair_bytes: float = 0.0
    kept_mask_bytes: int = 0
    #: of the pages, how many can lie in the host's memory and on the disk only
    num_host_pages: int = 0
    num_disk_pages: int = 0
    #: what can be stopped at inside each layer, in the order of a forward
    sites: tuple[tuple[SiteLayout, ...], ...] = ()
    #: site -> why this model has it not, in some layers or all
    sites_off: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_device_pages(self) -> int:
        return self.num_pages - self.num_host_pages - self.num_disk_pages

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

    def point(self, spec: object) -> Point:
        """The point of a location, or `UnknownLocation`; `NotSupported` if this model has no such
        site."""
        location = parse_location(spec, self.num_layers)
        point = location.point(self.num_layers)
        if is_inner(point) and self._site(point) is None:
            why = self.sites_off.get(location.site, "its layers show no such tensor")
            have = [layout.site for layout in self.inner_sites(layer_of(point))]
            raise NotSupported(
                f"{location}: this model has no {location.site} there ({why}); inside layer"
                f" {location.layer} it has {', '.join(have) or 'no sites'}",
                site=location.site,
            )
        return point

    def inner_sites(self, layer: int) -> tuple[SiteLayout, ...]:
        """What can be stopped at inside a layer."""
        return self.sites[layer] if self.sites else ()

    def _site(self, point: Point) -> SiteLayout | None:
        site = site_of(point)
        return next((s for s in self.inner_sites(layer_of(point)) if s.site == site), None)

    def layout(self, point: Point, end_token: int) -> tuple[int | None, int]:
        """Heads (None without) and channels of the tensor at a point.

        end_token: one past the last position of the forward, for tensors with an axis of keys.
        """
        if not is_inner(point):
            return None, self._width(point)
        found = self._site(point)
        assert found is not None, f"point {point} is no site of this model"
        return found.heads, found.width or end_token

    def _width(self, point: Point) -> int:
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
    #: copies of pages under way at once, for write-behind
    copies_in_flight: int = 4
    #: what came to rest is copied from the next tick on, not at once: whoever goes on before then
    #: gets the host's time, and no page is copied that is written again next
    copies_from_ticks: bool = False
    #: parts of the device that may be unable to leave at once before the host gives to the disk,
    #: and until it need not any more
    high_mark: float = 0.85
    low_mark: float = 0.75
    #: how many owners there are; one alone may change the budgets
    owners: int = 1
    #: a session left alone for so long leaves the device, seconds; None: never for that
    idle_after_s: float | None = 30.0
    #: a session not used for so long is put to rest on disk, seconds; None: never
    lease_s: float | None = None
    #: of the places where a session stood: those listed, branches, and of how many, and how many
    #: bytes, the tensors are kept; the others are run to again
    nodes_per_session: int = 4096
    branches_per_session: int = 64
    kept_stops_per_session: int = 256
    kept_bytes_per_session: int = 256 << 20
    #: likewise of all sessions together
    kept_bytes: int = 1 << 30
    #: what tensors of all sessions may come to beside pages, those of kept stops included; None: as
    #: much as the device has
    tensor_bytes: int | None = None
    #: questions about stops that are being computed
    scratch_per_owner: int = 4
    #: of one capture, in float32
    captured_bytes: int = 1 << 30
    #: a prefill beside which others wait is handed over after this many (chunk, layer) steps
    prefill_slice: int = 8
    #: entries of a session's story that are kept
    story_entries: int = 1000
