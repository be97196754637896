"""Stops, edits and questions inside a layer: whole kernels on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from notebooks.harness.inprocess import Local, local_kernel
from notebooks.harness.tiny import make_folder
from tests.kernel import site_cases

#: sequential; post-norms with eager attention; a mixture of experts; attention and MLP side by side
MODELS = (
    "llama-float32", "llama-bfloat16", "gemma2-float32", "mixtral-bfloat16", "gpt_neox-float32",
)  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def local(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Local]:
    family, dtype = request.param.split("-")
    folder = make_folder(family, tmp_path_factory.mktemp("models"))
    with local_kernel(
        model=folder, dtype=dtype, device="cpu", prefill_chunk=16, kv_memory_bytes=32 << 20
    ) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every session and every scratch fork ended, every page came back."""
    local: Local = request.getfixturevalue("local")
    yield
    local.kernel.state.check()
    assert not local.kernel.state.questions
    assert local.kernel.state.pool.num_free == local.cache.num_pages


def test_every_site_goes_on_as_if_never_met(local: Local) -> None:
    site_cases.every_site_goes_on_as_if_never_met(local)


def test_stepping_in_passes_every_site_and_changes_nothing(local: Local) -> None:
    site_cases.stepping_in_passes_every_site_and_changes_nothing(local)


def test_an_edit_at_any_site_shows_and_is_undone_exactly(local: Local) -> None:
    site_cases.an_edit_at_any_site_shows_and_is_undone_exactly(local)


def test_previews_equal_what_follows(local: Local) -> None:
    site_cases.previews_equal_what_follows(local)


def test_attribution_sums_to_the_logit(local: Local) -> None:
    tolerance = 1e-4 if local.kernel.info.dtype == "float32" else 0.25
    site_cases.attribution_sums_to_the_logit(local, tolerance)


def test_attention_is_what_the_site_holds(local: Local) -> None:
    site_cases.attention_is_what_the_site_holds(local)


def test_sites_that_are_off_are_refused(local: Local) -> None:
    site_cases.sites_that_are_off_are_refused(local)


def test_edits_equal_hooks(local: Local) -> None:
    if "llama" not in local.kernel.info.architecture.lower():
        pytest.skip("hooks on modules mean something else in this family")
    tolerance = 1e-3 if local.kernel.info.dtype == "float32" else 0.1
    site_cases.edits_equal_hooks(local, tolerance)


def test_a_router_is_read_with_the_edits_on_the_way(local: Local) -> None:
    site_cases.a_router_is_read_with_the_edits_on_the_way(local)
