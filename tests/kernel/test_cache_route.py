"""Whole kernels over the Cache route: as exact as the others, with prompts bound by masks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from djinn_nb import errors
from kernel_server.engine import cache_route
from notebooks.harness.inprocess import Local, local_kernel
from tests.kernel import cases
from tests.models import zoo


def folder_of(name: str, folder: Path) -> Path:
    """A tiny model of the family, without a token that ends a generation."""
    model = zoo.model(name)
    for config in (model.config, model.generation_config):
        config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


@pytest.fixture(
    scope="module", params=["bloom", pytest.param("falcon (alibi)", marks=pytest.mark.slow)]
)
def local(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Local]:
    folder = folder_of(request.param, tmp_path_factory.mktemp("model"))
    with local_kernel(
        model=folder, dtype="float32", device="cpu", prefill_chunk=16, kv_memory_bytes=32 << 20
    ) as made:
        assert made.kernel.info.load_check["attention"].startswith("Cache, ")
        assert made.kernel.info.fingerprint["attention"].startswith("djinn_cache_")
        yield made


def test_stops_change_nothing(local: Local) -> None:
    cases.stops_change_nothing(local, chunks=2.5)


def test_random_walks_end_alike(local: Local) -> None:
    cases.random_walks_end_alike(local, seed=0, steps=30)


def test_a_sticky_edit_equals_a_hook(local: Local) -> None:
    cases.sticky_edit_equals_a_hook(local, 1e-3)


def test_a_prompt_whose_masks_have_no_room_is_refused_with_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_route, "MASK_BYTES", 20 * 20 * 4)  # one float32 for each pair
    folder = folder_of("bloom", tmp_path / "model")
    with local_kernel(model=folder, dtype="float32", device="cpu", prefill_chunk=16) as local:
        with pytest.raises(errors.PromptTooLong, match=r"21 prompt tokens exceed the 20 .* Cache"):
            local.server.launch([5] * 21, max_new_tokens=2)
        session = local.server.launch([5] * 20, max_new_tokens=4)
        session.continue_()

        assert local.server.model.max_prompt == 20
        assert len(session.tokens) == 24
