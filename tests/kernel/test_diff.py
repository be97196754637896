"""Two nodes compared by whole kernels: the figures are those of the tensors, computed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from djinn_nb import Session, Stopped
from djinn_nb.diffs import Diff
from kernel_server.engine import comparing
from notebooks.harness.exactness import different, random_ids
from notebooks.harness.inprocess import Local, local_kernel
from notebooks.harness.tiny import make_folder
from tests.kernel import branch_cases, tier_cases
from tests.kernel.cases import prompt_of


@pytest.fixture(scope="module", params=["llama-float32", "gemma2-bfloat16"])
def local(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Local]:
    family, dtype = request.param.split("-")
    folder = make_folder(family, tmp_path_factory.mktemp("models"))
    with local_kernel(
        model=folder, dtype=dtype, device="cpu", prefill_chunk=16,
        kv_memory_bytes=2 << 20, host_memory_bytes=2 << 20,
    ) as made:  # fmt: skip
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    local: Local = request.getfixturevalue("local")
    yield
    for session_id in local.server.sessions().index:
        local.server.attach(session_id).terminate()
    tier_cases.nothing_is_left(local)


def launched(local: Local, tokens: int = 20, seed: int = 5, new_tokens: int = 5) -> Session:
    ids = random_ids(tokens, local.server.model.vocab_size, seed=seed)
    return local.server.launch(list(ids), max_new_tokens=new_tokens)


def streams(session: Session, forward: int) -> dict[str, Any]:
    """float32 [tokens, hidden] at every place of a forward that the session has passed."""
    stop = session.rewind(forward, "logits")
    assert isinstance(stop, Stopped)
    places = ["embedding", *range(session.client.model.num_layers)]
    return dict(session.capture(places, what="tensor"))


def lens_of(local: Local, rows: np.ndarray) -> torch.Tensor:
    """Log probabilities, float64, of rows as the model's own norm and head read them."""
    dtype = next(local.model.model.parameters()).dtype
    with torch.inference_mode():
        logits = local.segments.lens(torch.from_numpy(rows).to(dtype))
    return logits.float().log_softmax(-1).double()


def same(found: Diff) -> bool:
    zero = bool((found.changed == 0).all(axis=None) and (found.difference == 0).all(axis=None))
    whole = bool((found.cosine == 1).all(axis=None) and (found.kl == 0).all(axis=None))
    return zero and whole and found.is_same and found.first_divergence is None


def test_branches_without_an_edit_are_the_same_to_the_bit(local: Local) -> None:
    session = launched(local)
    first = session.continue_()
    for kept in (256, 0):
        branch_cases.keep(local, kept_stops_per_session=kept)
        for place in ((0, "embedding"), (2, "layers.1.output")):
            session.rewind(*place)
            again = session.continue_()
            found = session.diff(first, again)

            assert same(found) and "no divergence" in repr(found)
    branch_cases.keep(local, kept_stops_per_session=256)
    child = session.fork()
    assert same(session.diff(session, child))
    assert same(child.diff(session.go_to(first.number)))


@pytest.mark.parametrize(("layer", "token"), [(0, 3), (2, -2), (3, -1)])
def test_the_first_divergence_is_where_a_difference_was_planted(
    local: Local, layer: int, token: int
) -> None:
    session = launched(local)
    plain = session.continue_()
    stop = session.rewind(0, layer)
    assert isinstance(stop, Stopped)
    assert stop.edit(scale=-2.0, tokens=token).elements_changed
    here = stop.diff(plain)
    found = session.diff(plain, session.continue_())

    for one in (here, found):
        first = one.first_divergence
        assert first is not None
        assert (first.forward, first.location) == (0, f"layers.{layer}.output")
        assert first.position == token % 20
    # what lies before in the run, and tokens that attend to none of it, are untouched
    before = found.changed.loc[:, : first.position - 1]
    assert (before == 0).all(axis=None)
    assert (found.changed.iloc[: layer + 1] == 0).loc[:, :19].all(axis=None)
    assert (here.changed > 0).sum().sum() == 1


@pytest.mark.parametrize("forward", [0, 2])
def test_every_figure_is_that_of_the_tensors_by_hand(local: Local, forward: int) -> None:
    session = launched(local)
    plain = session.continue_()
    stop = session.rewind(forward, "layers.1.output")
    assert isinstance(stop, Stopped)
    stop.edit(scale=1.5, tokens=[-1] if forward else [4, 11])
    edited = session.continue_()
    found = session.diff(plain, edited)

    assert found._reply.first_token == (20 + forward - 1 if forward else 0)
    for which in sorted({forward, 4}):
        session.go_to(plain.number)
        one = streams(session, which)
        session.go_to(edited.number)
        two = streams(session, which)
        first = 0 if which == 0 else 20 + which - 1
        for location, a in one.items():
            b, columns = two[location], range(first, first + len(a))
            changed = (a.view(np.int32) != b.view(np.int32)).sum(1)
            assert list(found.changed.loc[location, columns]) == list(changed)
            wide, other = a.astype(np.float64), b.astype(np.float64)
            apart = np.linalg.norm(other - wide, axis=1)
            assert np.allclose(found.difference.loc[location, columns], apart, rtol=1e-6, atol=0)
            norms = [np.linalg.norm(x, axis=1) for x in (wide, other)]
            cosine = np.where(changed > 0, (wide * other).sum(1) / (norms[0] * norms[1]), 1.0)
            assert np.allclose(found.cosine.loc[location, columns], cosine, atol=1e-6, rtol=0)
            change = norms[1].astype(np.float32) - norms[0].astype(np.float32)
            assert np.allclose(found.norm_change.loc[location, columns], change, atol=1e-6)
            p, q = lens_of(local, a), lens_of(local, b)
            kl = (q.exp() * (q - p)).sum(-1).clamp_min(0).numpy()
            assert np.allclose(
                found.kl.loc[location, columns], np.where(changed > 0, kl, 0), rtol=2e-3, atol=2e-6
            )
    frame = found.frame()
    assert len(frame) == found.changed.size and frame["changed"].sum() > 0
    assert list(frame["forward"]) == sorted(frame["forward"])


def test_looking_changes_nothing_and_evicted_pages_are_brought(local: Local) -> None:
    prompt = prompt_of(local, 1.4, new_tokens=5)
    (reference,) = branch_cases.references_of(local, [prompt])
    session = prompt.launch(local)
    session.break_at(1, ignore=2)
    stop = session.continue_()
    assert isinstance(stop, Stopped) and stop.forward == 2
    child = session.fork()
    child.stop.edit(scale=0.5)  # type: ignore[union-attr]
    there = session.diff(child)
    before = session.refresh()
    for one in (session, child):
        one.evict(to="host")
    again = session.diff(child)

    assert again.changed.equals(there.changed) and again.kl.equals(there.kl)
    now = session.refresh()
    assert (now.tokens, now.stop, now.breakpoints) == (
        before.tokens, before.stop, before.breakpoints,
    )  # fmt: skip
    branch_cases.ends_as(session, prompt, reference)


def test_prompts_that_differ_are_compared_position_by_position(local: Local) -> None:
    ids = list(random_ids(20, local.server.model.vocab_size, seed=5))
    one = local.server.launch(ids, max_new_tokens=4)
    other = local.server.launch([*ids[:9], (ids[9] + 1) % 100, *ids[10:15]], max_new_tokens=4)
    first, second = one.continue_(), other.continue_()
    found = first.diff(second)

    assert list(found.changed.columns) == list(range(18))
    assert found.first_divergence is not None
    assert found.first_divergence[:3] == (0, "embedding", 9)
    assert 9 in found.tokens.index and "the prompts differ (20 and 15 tokens)" in repr(found)
    a, b = streams(one, 0), streams(other, 0)
    rows = (a["layers.2.output"][:15].view(np.int32) != b["layers.2.output"].view(np.int32)).sum(1)
    assert list(found.changed.loc["layers.2.output"].iloc[:15]) == list(rows)


def test_a_chosen_token_has_the_figures_it_has_among_all(local: Local) -> None:
    session = launched(local)
    plain = session.continue_()
    session.rewind(0, 1).edit(scale=-2.0, tokens=3)  # type: ignore[union-attr]
    edited = session.continue_()
    every = session.diff(plain, edited)
    some = session.diff(plain, edited, tokens=[3, -1], lens=False)

    assert list(some.changed.columns) == [3, 23]
    assert some.changed.equals(every.changed[[3, 23]])
    assert some.difference.equals(every.difference[[3, 23]])
    assert some.kl.isna().all(axis=None) and not every.kl.isna().any(axis=None)


def test_the_lens_of_too_many_tokens_is_that_of_the_last_and_says_so(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = launched(local)
    plain = session.continue_()
    session.rewind(0, "embedding").edit(scale=-2.0)  # type: ignore[union-attr]
    edited = session.continue_()
    every = session.diff(plain, edited)
    monkeypatch.setattr(comparing, "MAX_LENS_ROWS", 3 * len(every.changed))
    some = session.diff(plain, edited)

    # other rows in the head's company: the last digit may differ
    assert np.allclose(some.kl.iloc[:, -3:], every.kl.iloc[:, -3:], rtol=1e-3)
    assert some.kl.iloc[:, :-3].isna().all(axis=None)
    assert "kl of the last 3 tokens only" in repr(some)


def test_the_runs_go_on_as_they_would_have(local: Local) -> None:
    prompt = prompt_of(local, 0.5, new_tokens=4)
    (reference,) = branch_cases.references_of(local, [prompt])
    session = prompt.launch(local)
    session.run_to("layers.1.middle")
    child = session.fork()
    session.diff(child)
    for one in (session, child):
        branch_cases.ends_as(one, prompt, reference)
    assert different(session.logits, child.logits) == 0
