"""Every site inside a layer on one GPU, in bfloat16, on families that add to the stream in three
different ways: stops, edits, previews, attention and attribution."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from notebooks.harness.inprocess import Local, local_kernel
from notebooks.harness.tiny import make_folder
from tests.kernel import site_cases

pytestmark = pytest.mark.gpu

#: trained; sequential; learnt positions and biases; post-norms, soft caps and windows; experts;
#: attention and MLP side by side
MODELS = ("bundled", "llama", "gpt2", "gemma2", "mixtral", "gpt_neox")


@pytest.fixture(scope="module", params=MODELS)
def local(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Local]:
    folder = None
    if request.param != "bundled":
        folder = make_folder(request.param, tmp_path_factory.mktemp("models"))
    with local_kernel(
        model=folder, dtype="bfloat16", device="cuda:0", prefill_chunk=16,
        kv_memory_bytes=64 << 20,
    ) as made:  # fmt: skip
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
    site_cases.attribution_sums_to_the_logit(local, 0.25)


def test_attention_is_what_the_site_holds(local: Local) -> None:
    site_cases.attention_is_what_the_site_holds(local)


def test_a_router_is_read_with_the_edits_on_the_way(local: Local) -> None:
    site_cases.a_router_is_read_with_the_edits_on_the_way(local)


def test_sites_that_are_off_are_refused(local: Local) -> None:
    site_cases.sites_that_are_off_are_refused(local)


def test_edits_equal_hooks(local: Local) -> None:
    if "llama" not in local.kernel.info.architecture.lower():
        pytest.skip("hooks on modules mean something else in this family")
    site_cases.edits_equal_hooks(local, 0.1)
