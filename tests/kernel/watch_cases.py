"""What must hold of conditions, data breakpoints and logpoints, whatever the device."""

from __future__ import annotations

import numpy as np

from djinn_nb import Finished, Stopped
from notebooks.harness.exactness import different
from notebooks.harness.inprocess import Local
from tests.kernel.cases import prompt_of


def watching_changes_no_bit(local: Local) -> None:
    """A run that is judged at every layer and logged is the run that is left alone."""
    prompt = prompt_of(local, 2.5, new_tokens=5)
    plain, watched = prompt.launch(local), prompt.launch(local)
    watched.break_when(norm_above=1e30)
    watched.break_when(top_token_changes=True, ignore=10**6, tokens=-1)
    watched.log_at("every layer", what="tensor", tokens=[0, -1])
    watched.log_at("every layer", condition="entropy > 0 and position % 3 == 0")
    plain.continue_()
    assert isinstance(watched.continue_(), Finished)

    assert watched.tokens == plain.tokens
    assert different(watched.logits, plain.logits) == 0
    plain.terminate()
    watched.terminate()


def a_log_holds_what_stops_show(local: Local) -> None:
    """Values bit for bit, figures within rounding, in the prefill and in decodes."""
    prompt = prompt_of(local, 2.5, new_tokens=3)
    place = local.num_layers // 2
    logged, stopped = prompt.launch(local), prompt.launch(local)
    tensors = logged.log_at([place, "final_norm"], what="tensor")
    figures = logged.log_at(place)
    logged.continue_()
    stopped.break_at(place)
    rows = []
    while isinstance(stop := stopped.continue_(), Stopped):
        rows.append(stop.value.numpy())
    values = np.concatenate(rows)
    frame = figures.frame()

    assert different(tensors.tensors()[f"layers.{place}.output"].values, values) == 0
    norms = np.linalg.norm(values.astype(np.float64), axis=1)
    np.testing.assert_allclose(frame["norm"], norms, rtol=1e-5)
    np.testing.assert_array_equal(frame["largest"], np.abs(values).max(1))
    assert frame["position"].tolist() == list(range(len(values)))
    logged.terminate()
    stopped.terminate()


def conditions_read_the_lens_that_stops_show(local: Local) -> None:
    """Each token at which a condition on the lens holds, for a prompt of several chunks."""
    prompt = prompt_of(local, 2.5, new_tokens=1)
    place = local.num_layers // 2
    shown = prompt.launch(local)
    stop = shown.run_to(place)
    assert isinstance(stop, Stopped)
    lens = stop.lens(top_k=1, tokens="all")
    entropy = lens["entropy_nats"].to_numpy()
    limit = float(np.median(entropy))
    norms = np.linalg.norm(stop.value.numpy().astype(np.float64), axis=1)
    between = float(np.median(norms))
    shown.terminate()
    session = prompt.launch(local)
    session.break_at(place, condition=f"norm > {between} and entropy > {limit}")
    found = session.continue_()
    held = set(found.hit_tokens) if isinstance(found, Stopped) else set()

    # other rows beside it may round an entropy to the other side of the limit
    near = {p for p, e in enumerate(entropy) if abs(e - limit) < 1e-3 * max(limit, 1)}
    near |= {p for p, n in enumerate(norms) if abs(n - between) < 1e-5 * between}
    expected = {p for p, e in enumerate(entropy) if e > limit and norms[p] > between}
    assert held - near == expected - near
    session.terminate()
