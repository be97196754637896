"""Sites inside layers on one GPU: the load check keeps them, stops change no bit, edits arrive."""

from __future__ import annotations

import pytest
import torch

from kernel_server.engine.attention import PagedAttentionRoute
from kernel_server.engine.loading import load_check, page_shape
from kernel_server.models.resumable import ResumableModel
from kernel_server.protocol.location import INNER_SITES, inner_point
from tests.engine.bookkeeper import Books
from tests.engine.test_sites import put, stopped
from tests.models import tiny

pytestmark = pytest.mark.gpu

FAMILIES = ["llama", "gemma2", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "cohere2"]
DTYPES = [torch.bfloat16, torch.float32]
#: What the family's structure leaves out.
LACKS = {
    "gpt_neox": {"middle"},
    "cohere2": {"middle"},
    "mixtral": {"mlp.neurons"},
    "gpt_oss": {"mlp.neurons"},
}


@pytest.fixture(params=DTYPES, ids=["bf16", "fp32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def ramped(chunk: torch.Tensor) -> torch.Tensor:
    """Channel by channel another factor."""
    width = chunk.shape[-1]
    ramp = torch.linspace(0.0, 2.0, 7, device=chunk.device, dtype=chunk.dtype)
    return chunk * ramp.repeat(width)[:width]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_load_check_keeps_every_site(name: str, dtype: torch.dtype) -> None:
    model = ResumableModel(tiny.family(name, dtype).to("cuda"), PagedAttentionRoute())
    report = load_check(model, page_shape(model))

    assert [check for check in report.site_checks if not check.passed] == []
    for site, support in report.sites.items():
        assert support.layers == ([] if site in LACKS.get(name, ()) else list(range(tiny.LAYERS)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stop_at_any_site_changes_no_bit_and_an_edit_does(name: str, dtype: torch.dtype) -> None:
    model = ResumableModel(tiny.family(name, dtype).to("cuda"), PagedAttentionRoute())
    books, prompt = Books(model, chunk=6), model.sample_ids(15)
    reference = books.generate(books.launch(prompt), 2)
    for site in INNER_SITES:
        if site in LACKS.get(name, ()):
            continue
        for forward in (0, 1):
            session = stopped(books, prompt, forward, inner_point(3, site))
            copied, edited = books.fork(session), books.fork(session)
            standing = session.forward
            assert standing is not None
            standing.drop_cache()
            books.run(session)
            if site != "attention.pattern":
                put(books, copied, torch.clone)
            books.run(copied)
            put(books, edited, ramped)
            books.run(edited)

            assert torch.equal(session.logits[forward], reference.logits[forward]), site
            assert torch.equal(copied.logits[forward], reference.logits[forward]), site
            assert not torch.equal(edited.logits[forward], reference.logits[forward]), site
            for done in (session, copied, edited):
                books.drop(done)
