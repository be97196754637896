"""What is kept of stops that were left: how much it is at most, and that nothing is lost by it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from djinn_nb import Stopped
from kernel_server.models.recording import storages
from kernel_server.protocol.errors import OutOfDeviceMemory
from kernel_server.state import tensor_bytes
from notebooks.harness.inprocess import Local, local_kernel
from notebooks.harness.tiny import make_folder
from tests.kernel import branch_cases, tier_cases
from tests.kernel.cases import prompt_of

MODELS = ("llama-float32", "gemma2-bfloat16", "gpt2-float32", "gpt_neox-float32", "mixtral-float32")


@pytest.fixture(scope="module", params=MODELS)
def local(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Local]:
    family, dtype = request.param.split("-")
    folder = make_folder(family, tmp_path_factory.mktemp("models"))
    with local_kernel(
        model=folder, dtype=dtype, device="cpu", prefill_chunk=16, kv_memory_bytes=8 << 20,
    ) as made:  # fmt: skip
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    local: Local = request.getfixturevalue("local")
    yield
    tier_cases.nothing_is_left(local)
    state = local.kernel.state
    assert (state.kept_bytes, state.kept_stops) == (0, {})
    tier_cases.wait_until(lambda: local.kernel.engine.nbytes() == (0, 0))


@pytest.mark.parametrize("chunks", (0.5, 1.0, 2.5))
def test_no_stop_holds_more_than_is_counted(local: Local, chunks: float) -> None:
    """At every site of a layer, and outside the layers, with an edit and without."""
    state, engine = local.kernel.state, local.kernel.engine
    sites = [layout.site for layout in local.kernel.info.sites[1]]
    places = ["embedding", *(f"layers.1.{site}" for site in sites), "layers.2.output"]
    session = prompt_of(local, chunks, new_tokens=3).launch(local)
    session.break_when(condition="top_token_changed and norm < 0")  # the lens is remembered
    num_edits = 0
    for forward in range(2):
        for place in [*places, "final_norm", "logits"]:
            if forward and place == "embedding":
                continue
            stop = session.run_to(place)
            assert isinstance(stop, Stopped) and stop.forward == forward
            inside = state.sessions[session.id]
            if place not in ("embedding", "layers.1.middle"):
                stop.edit(scale=0.5)
                num_edits += 1
            stop.value.numpy()
            counted = tensor_bytes.stop_bytes(state.shape, inside)
            standing, _ = engine.nbytes()
            assert standing <= tensor_bytes.standing_bytes(state.shape, inside), place
            session.next()
            node = max(n for n in inside.tree.kept if inside.tree.nodes[n].stop is not None)
            assert inside.tree.kept[node].nbytes == counted, place
            kept = engine._sessions[session.id].stops[node]
            assert 0 < sum(storages(kept.tensors()).values()) <= counted, place
            session.step_back()
    assert num_edits > 10
    session.terminate()


def test_what_is_kept_is_bounded_and_nothing_is_lost(local: Local) -> None:
    branch_cases.what_is_kept_is_bounded(local)


def test_an_edited_past_comes_back_though_nothing_is_kept(local: Local) -> None:
    branch_cases.edits_come_back(local)


def test_rows_of_memory_add_up(local: Local) -> None:
    session = prompt_of(local, 2.5).launch(local)
    for _ in range(4):
        session.next()
    rows = {kind: nbytes for kind, nbytes, _ in local.kernel.memory()}

    assert rows["kept stops"] > 0 and rows["activations"] > 0
    parts = [n for kind, n in rows.items() if kind != "host process" and "(disk)" not in kind]
    assert sum(parts) == rows["host process"]
    fork = session.fork()
    again = {kind: nbytes for kind, nbytes, _ in local.kernel.memory()}
    assert again["kept stops"] == rows["kept stops"], "a fork shares them"
    assert again["activations"] == rows["activations"]
    session.terminate()
    left = {kind: nbytes for kind, nbytes, _ in local.kernel.memory()}
    assert left["kept stops"] == rows["kept stops"]
    fork.terminate()


def test_a_cap_refuses_new_sessions_and_loses_none(local: Local) -> None:
    state, engine = local.kernel.state, local.kernel.engine
    prompts = [prompt_of(local, 2.5, new_tokens=3, seed=i) for i in range(4)]
    references = branch_cases.references_of(local, prompts)
    need = tensor_bytes.session_bytes(state.shape, len(prompts[0].ids), 3)
    most = int(3.5 * need)
    branch_cases.keep(local, tensor_bytes=most)
    sessions = [prompt.launch(local) for prompt in prompts[:3]]
    with pytest.raises(
        OutOfDeviceMemory, match=r"terminate a session, or .* --kept-memory"
    ) as told:
        prompts[3].launch(local)
    assert told.value.details["limit"] == most and len(local.server.sessions()) == 3
    for _ in range(3):
        for session in sessions:
            assert isinstance(session.next(), Stopped)
            assert sum(engine.nbytes()) <= most
    with pytest.raises(OutOfDeviceMemory, match="a fork of"):
        sessions[0].fork()
    for session, prompt, reference in zip(sessions, prompts, references, strict=False):
        session.step_back()
        branch_cases.ends_as(session, prompt, reference)
        assert sum(engine.nbytes()) <= most
    sessions[0].terminate()
    last = prompts[3].launch(local)
    branch_cases.ends_as(last, prompts[3], references[3])
    for session in (*sessions[1:], last):
        session.terminate()
    branch_cases.keep(local, tensor_bytes=None)
