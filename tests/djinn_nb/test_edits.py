"""Every kind of edit through a real server: against numpy, against a run, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import djinn_nb as djinn
from djinn_nb import errors
from djinn_nb.edits import KINDS, OPTIONS
from djinn_nb.files import read_array
from tests.djinn_nb.conftest import HIDDEN, NUM_LAYERS, PROMPT, VOCABULARY

GREEDY = {"max_new_tokens": 4}


@pytest.fixture
def stop(session: djinn.Session) -> djinn.Stopped:
    """Stopped after layer 3 of the prefill, which has more than one chunk."""
    return session.run_to(3)


# -- values ---------------------------------------------------------------------------------------


def test_clamp_project_out_mean_and_swap_do_what_numpy_does(stop):
    x = stop.hidden_states.numpy()
    direction = np.linspace(-1, 2, HIDDEN, dtype=np.float32)

    stop.edit(clamp=(-0.5, None))
    np.testing.assert_array_equal(stop.hidden_states.numpy(), np.maximum(x, np.float32(-0.5)))
    stop.undo()
    stop.edit(project_out=direction, tokens=[1, 9])
    unit = direction / np.linalg.norm(direction)
    y = stop.hidden_states.numpy()
    np.testing.assert_allclose(y[[1, 9]], x[[1, 9]] - np.outer(x[[1, 9]] @ unit, unit), atol=1e-5)
    stop.undo()
    stop.edit(mean=True, tokens=[0, 5, 13])
    y = stop.hidden_states.numpy()
    np.testing.assert_allclose(y[[0, 5, 13]], np.stack([x[[0, 5, 13]].mean(0)] * 3), atol=1e-6)
    stop.undo()
    stop.edit(swap=True, tokens=[2, -1])
    y = stop.hidden_states.numpy()
    np.testing.assert_array_equal(y[[2, -1]], x[[-1, 2]])
    stop.undo()

    np.testing.assert_array_equal(stop.hidden_states.numpy(), x)


def test_an_ablated_head_is_zero_and_the_others_are_not(session):
    stop = session.run_to("layers.2.attention.heads")
    before = stop.value.numpy()

    edit = stop.ablate(layer=2, heads=[1, 3], tokens=slice(4, None))

    after = stop.value.numpy()
    assert before.shape[1] == 4
    assert not after[4:, [1, 3]].any()
    np.testing.assert_array_equal(after[:4], before[:4])
    np.testing.assert_array_equal(after[:, [0, 2]], before[:, [0, 2]])
    assert edit.elements_changed == before[4:, [1, 3]].size
    assert "zero at layers.2.attention.heads" in repr(edit) and "heads 1, 3" in repr(edit)


def test_neurons_are_ablated_ahead_to_their_mean(stop):
    edit = stop.ablate(layer=5, neurons=[7, 0], mean=True)

    reached = stop.session.run_to("layers.5.mlp.neurons").value.numpy()

    assert (reached[:, 7] == reached[0, 7]).all() and (reached[:, 0] == reached[0, 0]).all()
    assert len(np.unique(reached[:, 1])) > 1
    assert edit.location == "layers.5.mlp.neurons"


def test_ablating_a_head_changes_what_is_generated(server):
    def logits(ablate: bool) -> np.ndarray:
        session = server.launch(PROMPT, max_new_tokens=1)
        stop = session.run_to("embedding")
        if ablate:
            stop.ablate(layer=1, heads=2)
        return session.run_to("logits").value.numpy()

    assert (logits(True) != logits(False)).any()
    np.testing.assert_array_equal(logits(True), logits(True))


# -- patches --------------------------------------------------------------------------------------


@pytest.fixture
def other(server: djinn.Server) -> djinn.Stopped:
    return server.launch("Mary went to the park", max_new_tokens=2).run_to(3)


def test_a_patch_from_another_session_does_not_travel_through_the_client(stop, other, monkeypatch):
    wanted = other.hidden_states[1:3].numpy()

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was fetched or sent")

    with monkeypatch.context() as forbidden:
        forbidden.setattr(type(stop.session.client), "read_tensor", refuse)
        forbidden.setattr(type(stop.session.client), "upload", refuse)
        edit = stop.edit(patch=other.hidden_states[1:3], tokens=[-1, 0])

    np.testing.assert_array_equal(stop.hidden_states.numpy()[[-1, 0]], wanted)
    assert f"patch [2, {HIDDEN}] of session {other.session.id}, stop {other.number}" in repr(edit)


def test_a_patch_of_a_whole_forward_gives_the_run_it_was_taken_from(server):
    source = server.launch([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], **GREEDY)
    target = server.launch([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], **GREEDY)
    theirs, ours = source.run_to(NUM_LAYERS - 1), target.run_to(NUM_LAYERS - 1)

    ours.edit(patch=theirs.value)

    np.testing.assert_array_equal(
        target.run_to("logits").value.numpy(), source.run_to("logits").value.numpy()
    )


def test_a_large_patch_is_read_in_pieces_and_leaves_no_transfer_open(server, eventually):
    theirs = server.launch([5, 6, 7] * 400, max_new_tokens=1).run_to(2)
    ours = server.launch([8, 9, 1] * 400, max_new_tokens=1).run_to(2)

    ours.edit(patch=theirs.value)

    np.testing.assert_array_equal(ours.value.numpy(), theirs.value.numpy())
    eventually(lambda: server.memory().loc["transfers", "bytes"] == 0)


def test_a_patch_from_its_own_stop_copies_one_token_to_another(stop):
    wanted = stop.value[3].numpy()

    stop.edit(patch=stop.value[3], tokens=7)

    np.testing.assert_array_equal(stop.value[7].numpy(), wanted)


def test_a_patch_of_one_row_may_be_sticky(server, other):
    wanted = other.value[-1].numpy()
    session = server.launch(PROMPT, max_new_tokens=3)
    session.run_to(3).edit(patch=other.value[-1], tokens=-1, sticky=True)

    for _ in range(2):
        stop = session.run_to("layers.3.output")
        np.testing.assert_array_equal(stop.value[-1].numpy(), wanted)


def test_a_patch_stands_alone_once_made(stop, other):
    wanted = other.hidden_states[-1].numpy()
    edit = stop.edit(patch=other.hidden_states[-1], tokens=-1)
    other.session.terminate()
    edit.disable()
    edit.enable()

    np.testing.assert_array_equal(stop.hidden_states[-1].numpy(), wanted)


def test_a_patch_of_one_head_goes_where_one_head_is_chosen(server):
    theirs = server.launch(PROMPT, **GREEDY).run_to("layers.2.attention.heads")
    ours = server.launch(PROMPT[::-1][:20], **GREEDY).run_to("layers.2.attention.heads")
    wanted = theirs.value[3:5, 2].numpy()

    ours.edit(patch=theirs.value[3:5, 2], tokens=[0, 1], heads=0)

    np.testing.assert_array_equal(ours.value[0:2, 0].numpy(), wanted)


def test_a_patch_comes_from_files_and_arrays(stop, tmp_path: Path):
    from safetensors.numpy import save_file

    x = stop.hidden_states.numpy()
    rows = np.arange(2 * HIDDEN, dtype=np.float32).reshape(2, HIDDEN)
    np.save(tmp_path / "rows.npy", rows)
    save_file({"a": rows * 2, "b": rows * 3}, tmp_path / "rows.safetensors")

    for patch, factor in [
        (rows, 1),
        (tmp_path / "rows.npy", 1),
        ((str(tmp_path / "rows.safetensors"), "b"), 3),
    ]:
        stop.edit(patch=patch, tokens=[4, 5])
        np.testing.assert_array_equal(stop.hidden_states[4:6].numpy(), rows * factor)
        stop.undo()
    np.testing.assert_array_equal(stop.hidden_states.numpy(), x)


def test_a_file_of_bfloat16_is_read_exactly(tmp_path: Path):
    import torch
    from safetensors.torch import save_file

    values = torch.linspace(-3, 3, 12).bfloat16().reshape(3, 4)
    save_file({"only": values}, tmp_path / "half.safetensors")

    np.testing.assert_array_equal(read_array(tmp_path / "half.safetensors"), values.float())


def test_a_stale_patch_is_refused_and_changes_nothing(stop, other):
    before = stop.hidden_states.numpy()
    patch = other.hidden_states[-1]
    other.session.next()

    with pytest.raises(errors.StaleStop, match=other.session.id):
        stop.edit(patch=patch, tokens=-1)

    np.testing.assert_array_equal(stop.hidden_states.numpy(), before)
    assert stop.session.edits == []


def test_a_patch_of_other_shape_is_refused_with_both(stop, other):
    with pytest.raises(errors.BadEdit, match=rf"\[1, {HIDDEN}\], and 3 tokens are selected"):
        stop.edit(patch=other.hidden_states[-1], tokens=[0, 1, 2])
    with pytest.raises(errors.BadEdit, match=r"patch has shape \[1, 8\], and 32 channels"):
        stop.edit(patch=other.hidden_states[-1, :8], tokens=-1)
    with pytest.raises(errors.BadEdit, match=rf"\[{len(other.tokens)}, {HIDDEN}\], and"):
        stop.edit(patch=other.value)


def test_a_named_vector_is_a_value(stop):
    from kernel_server.protocol import messages as m
    from kernel_server.protocol.arrays import Array

    client = stop.session.client
    ones = np.ones(HIDDEN, np.float32)
    request = m.StoreVector(
        name="edits-one",
        value=Array.from_numpy(ones),
        location="layers.3.output",
        replace=True,
    )
    client.call(request, m.VectorReply)
    before = stop.hidden_states.numpy()

    edit = stop.edit(vector="edits-one", alpha=2, tokens=0)
    stop.edit(project_out="edits-one", tokens=1)

    after = stop.hidden_states.numpy()
    np.testing.assert_array_equal(after[0], before[0] + np.float32(2))
    assert abs(after[1].sum()) < 1e-3 < abs(before[1].sum())
    assert "add 2 × vector 'edits-one'" in repr(edit)
    with pytest.raises(errors.UnknownVector, match="no vector named 'edits-two'"):
        stop.edit(add="edits-two")
    client.call(m.RemoveVector(name="edits-one"), m.Vectors)


# -- the next token -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 9.0, "top_p": 0.8, "seed": 5}]
)
def test_a_forced_token_is_drawn_whatever_the_sampler(server, sampling):
    session = server.launch(PROMPT, max_new_tokens=3, **sampling)
    edit = session.run_to(2).edit(force=" Mary", sticky=True)

    end = session.continue_()

    assert end.generated_text == " Mary Mary Mary"
    assert edit.location == "logits"
    assert "force token ' Mary' at logits" in repr(edit)
    assert edit.forwards_matched == 3


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_a_banned_token_is_never_drawn(server, temperature):
    def run(*banned: int) -> list[int]:
        seed = 1 if temperature else None
        session = server.launch(PROMPT, max_new_tokens=8, temperature=temperature, seed=seed)
        if banned:
            session.run_to("embedding").edit(ban=list(banned), sticky=True)
        return session.continue_().generated_tokens

    free = run()
    kept = run(*set(free))

    assert not {*free} & {*kept}
    assert run(*set(free)) == kept


def test_a_token_is_replaced_where_it_would_be_drawn(server):
    session = server.launch(PROMPT, max_new_tokens=1)
    stop = session.run_to("logits")
    drawn = int(stop.value.numpy().argmax())
    instead = (drawn + 1) % VOCABULARY

    stop.edit(replace=(drawn, instead))

    logits = stop.value.numpy()[0]
    assert logits.argmax() == instead and logits[drawn] == -np.inf
    assert session.continue_().generated_tokens == [instead]


def test_undo_at_the_logits_gives_every_bit_back(server):
    stop = server.launch(PROMPT, max_new_tokens=1).run_to("logits")
    before = stop.value.numpy()
    stop.edit(ban=[1, 2])
    stop.edit(force=7)
    stop.undo()
    stop.undo()

    np.testing.assert_array_equal(stop.value.numpy(), before)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wishes", "error", "words"),
    [
        ({"clamp": 3}, errors.BadEdit, "clamp is .least, largest."),
        ({"clamp": (None, None)}, errors.BadEdit, "give a bound"),
        ({"clamp": (2, 1)}, errors.BadEdit, "leaves no number"),
        ({"clamp": (0, float("inf"))}, errors.BadEdit, "NaN or infinite"),
        ({"mean": "yes"}, errors.BadEdit, "mean is True or left out"),
        ({"mean": True, "sticky": True}, errors.BadEdit, "a decode feeds one token"),
        ({"swap": True, "tokens": [0, 1, 2]}, errors.BadEdit, "exactly two tokens, and 3"),
        ({"swap": True, "zero": True}, errors.BadEdit, "got zero and swap"),
        ({"project_out": np.zeros(HIDDEN)}, errors.BadEdit, "direction is zero"),
        ({"project_out": 3}, errors.BadEdit, "not one number"),
        ({"patch": 3.0}, errors.BadEdit, "a patch is a vector"),
        ({"patch": "nowhere.npy"}, errors.BadArgument, "nowhere.npy cannot be read"),
        ({"patch": "rows.txt"}, errors.BadArgument, "neither a .npy nor a .safetensors"),
        ({"vector": np.ones(HIDDEN)}, errors.BadEdit, "use add="),
        ({"vector": "joy", "alpha": 2, "zero": True}, errors.BadEdit, "got zero and vector"),
        ({"force": " Mary", "location": 5}, errors.BadEdit, "not layers.5.output"),
        ({"force": [1, 2]}, errors.BadEdit, "force is one token"),
        ({"force": " Marvelous"}, errors.BadEdit, "no token of this model has the text"),
        ({"force": "Mary "}, errors.BadEdit, "did you mean ' Mary'"),
        ({"force": "\ufffd"}, errors.BadEdit, "tokens have the text .*give the id of one of them"),
        ({"force": VOCABULARY}, errors.BadEdit, "outside the vocabulary"),
        ({"force": 1.5}, errors.BadEdit, "by its id or its text"),
        ({"ban": []}, errors.BadEdit, "names no token"),
        ({"ban": [1, " Mary"]}, errors.BadEdit, "not both"),
        ({"ban": range(VOCABULARY)}, errors.BadEdit, "leaves none to be drawn"),
        ({"replace": " Mary"}, errors.BadEdit, "replace is .token, the one instead."),
        ({"replace": (5, 5)}, errors.BadEdit, "both are 5"),
        ({"zero": True, "heads": 0}, errors.BadSelector, "no heads"),
        (
            {"zero": True, "heads": 9, "location": "layers.4.attention.q"},
            errors.BadSelector,
            "head 9",
        ),
    ],
)
def test_a_mistake_is_refused_by_name_and_changes_nothing(stop, wishes, error, words):
    before = stop.hidden_states.numpy()

    with pytest.raises(error, match=words) as caught:
        stop.edit(**wishes)

    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(stop.hidden_states.numpy(), before)
    assert stop.session.edits == []


@pytest.mark.parametrize(
    ("wishes", "error", "words"),
    [
        ({"layer": 5}, errors.BadEdit, "heads= or neurons="),
        ({"layer": 5, "heads": 0, "neurons": 0}, errors.BadEdit, "one of the two"),
        ({"layer": 5, "heads": 4}, errors.BadSelector, "head 4 lies outside"),
        ({"layer": 5, "neurons": 64}, errors.BadSelector, "channel 64 lies outside"),
        ({"layer": 2, "heads": 0}, errors.BadEdit, "has passed"),
        ({"layer": 6, "heads": 0}, errors.UnknownLocation, "numbered 0 to 5"),
        ({"layer": "5", "heads": 0}, errors.BadArgument, "a layer is a whole number|layer is"),
        ({"layer": 5, "heads": 0, "mean": True, "sticky": True}, errors.BadEdit, "decode feeds"),
    ],
)
def test_an_ablation_that_cannot_be_is_refused(stop, wishes, error, words):
    with pytest.raises(error, match=words):
        stop.ablate(**wishes)

    assert stop.session.edits == []


def test_an_end_tells_of_an_edit_that_changed_nothing_whatever_else_there_is_to_say(stop):
    made = stop.edit(clamp=(-1e6, 1e6))
    end = repr(stop.session.continue_())

    assert made.elements_changed == 0 and "in forward 0 only" in repr(made)
    assert "changed nothing: no number differs; in forward 0 only" in end


def test_an_edit_behind_is_refused_with_a_call_that_leads_there(server):
    session = server.launch(PROMPT, max_new_tokens=2)
    stop = session.run_to(3)
    with pytest.raises(errors.BadEdit, match="has passed") as refused:
        stop.edit(zero=True, tokens=-1, location="layers.1.output")
    call = re.search(r"session\.rewind\((\d+), '([^']+)'\)", str(refused.value))
    assert call is not None
    back = session.rewind(int(call[1]), call[2])

    assert (back.forward, back.location) == (0, "layers.1.output")
    assert back.edit(zero=True, tokens=-1).elements_changed


def test_a_magic_and_its_completion_know_every_argument():
    from types import SimpleNamespace

    from djinn_nb.completion import Completer

    words = Completer(SimpleNamespace()).words  # type: ignore[arg-type]

    assert words("%djinn_edit c", "c") == ["clamp=", "channels="]
    assert words("%djinn_edit scale=2 m", "m") == ["mean=True"]
    assert set(djinn.Stopped.edit.__kwdefaults__) == {*KINDS, *OPTIONS}
