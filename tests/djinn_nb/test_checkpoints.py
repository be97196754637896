"""Sessions as files: whole or refused, and another program can read them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import djinn_nb as djinn
from djinn_nb import checkpoints, errors, recipes
from djinn_nb.client import CHUNK_BYTES
from tests.djinn_nb.conftest import HIDDEN, PROMPT


@pytest.fixture
def stopped(session: djinn.Session) -> djinn.Session:
    """One with an edit, a breakpoint and a branch."""
    stop = session.run_to("layers.1.output")
    stop.edit(add=np.ones(HIDDEN, np.float32), alpha=0.5)
    session.break_at(4, when="decode", condition="norm > 0", ignore=1)
    session.run_to("layers.3.output")
    return session


def finished(session: djinn.Session) -> list[int]:
    for point in session.breakpoints:
        point.remove()
    session.continue_()
    return list(session.tokens)


def test_one_that_is_loaded_goes_on_as_the_one_that_was_saved(server, stopped, tmp_path):
    path = stopped.save(tmp_path / "one")
    again = server.load(path, name="again")

    assert again.id != stopped.id and again.name == "again"
    assert again.stop is not None and again.stop.location == "layers.3.output"
    np.testing.assert_array_equal(again.stop.value.numpy(), stopped.stop.value.numpy())
    assert [e.info for e in again.edits] == [e.info for e in stopped.edits]
    assert [b.info for b in again.breakpoints] == [b.info for b in stopped.breakpoints]
    assert len(again.branches()) == len(stopped.branches())
    assert finished(again) == finished(stopped)


def test_other_programs_can_read_it(stopped, tmp_path):
    path = stopped.save(tmp_path / "one")
    content = json.loads((path / "session.json").read_text())
    tensors = load_file(path / "tensors.safetensors")

    assert content["about"]["prompt"] == PROMPT
    assert content["about"]["stop"] == "layers.3.output"
    assert content["fingerprint"]["dtype"] == "float32"
    assert tensors["array.0"].tolist() == list(stopped.newest.tokens)
    assert any(t.shape == (HIDDEN,) and (t == 1).all() for t in tensors.values())
    assert path.stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in path.iterdir())
    assert not list(tmp_path.glob(".*"))


def test_nothing_is_overwritten_and_nothing_half_written_is_left(stopped, tmp_path, monkeypatch):
    path = stopped.save(tmp_path / "one")
    with pytest.raises(errors.BadArgument, match="exists"):
        stopped.save(path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_synced", full)
    with pytest.raises(errors.BadArgument, match="No space left"):
        stopped.save(tmp_path / "two")
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_a_file_with_any_bit_changed_or_cut_off_is_refused(server, stopped, tmp_path):
    path = stopped.save(tmp_path / "one")
    rng = random.Random(3)
    before = len(server.sessions())
    for file in ("session.json", "tensors.safetensors"):
        data = (path / file).read_bytes()
        for number in range(30):
            copy = Path(shutil.copytree(path, tmp_path / f"{file}{number}"))
            hurt = bytearray(data)
            if number % 3:
                hurt[rng.randrange(len(hurt))] ^= 1 << rng.randrange(7)
            else:
                del hurt[rng.randrange(len(hurt)) :]
            (copy / file).write_bytes(hurt)
            if _means_the_same(file, data, bytes(hurt)):
                continue
            with pytest.raises(errors.BrokenCheckpoint) as told:
                server.load(copy)
            assert "\n" not in str(told.value)
    for file in ("session.json", "tensors.safetensors"):
        copy = Path(shutil.copytree(path, tmp_path / f"without {file}"))
        (copy / file).unlink()
        with pytest.raises(errors.BrokenCheckpoint, match="cannot be read"):
            server.load(copy)
    assert len(server.sessions()) == before


def _means_the_same(file: str, data: bytes, hurt: bytes) -> bool:
    """White space of JSON carries nothing."""
    if file != "session.json":
        return False
    try:
        return bool(json.loads(data) == json.loads(hurt))
    except ValueError:
        return False


def changed(path: Path, to: Path, **fields: object) -> Path:
    """A copy that is whole by its sums, and says something else."""
    copy = Path(shutil.copytree(path, to))
    file = copy / "session.json"
    content = json.loads(file.read_text())
    content["record"]["body"].update(fields)
    content["sha256"] = checkpoints._digest(content)
    file.write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"sizes": [6, 32, 9]}, errors.WrongModel),
        ({"generated": [100_000]}, errors.BadMessage),
        ({"forward": 3}, errors.BadMessage),
        ({"point": 99.0}, errors.BadMessage),
        ({"current": 77}, errors.BadMessage),
        ({"own_edits": [5]}, errors.BadMessage),
        ({"prompt": 9}, errors.BadMessage),
        ({"nodes": []}, errors.BadMessage),
        ({"temperature": -1.0}, errors.BadArgument),
        ({"max_new_tokens": 10**9}, errors.PromptTooLong),
        ({"status": "running"}, errors.BadArgument),
        ({"status": "odd"}, errors.BrokenCheckpoint),
        ({"seed": -4}, errors.BadArgument),
    ],
)
def test_a_record_that_lies_is_refused_and_changes_nothing(
    server, stopped, tmp_path, fields, error
):
    path = changed(stopped.save(tmp_path / "one"), tmp_path / "two", **fields)
    before = server.sessions()
    with pytest.raises(error) as told:
        server.load(path)
    assert "\n" not in str(told.value)
    assert list(server.sessions().index) == list(before.index)


def test_another_fingerprint_is_refused_and_can_be_accepted(server, stopped, tmp_path):
    path = stopped.save(tmp_path / "one")
    fingerprint = stopped.client.model.fingerprint | {"torch": "1.0"}
    tagged = {"$dict": fingerprint}
    other = changed(path, tmp_path / "two", fingerprint=tagged)
    with pytest.raises(errors.WrongFingerprint, match=r"torch was '1\.0'.*inexact=True"):
        server.load(other)
    again = server.load(other, inexact=True)
    assert again.newest.inexact
    assert finished(again) == finished(stopped)
    assert again.fork().newest.inexact


def test_a_large_edit_travels_in_chunks(server, tmp_path):
    session = server.launch(list(range(3, 303)) * 15, max_new_tokens=2)
    stop = session.run_to("layers.1.mlp.neurons")
    value = np.random.default_rng(0).standard_normal((4500, 64)).astype(np.float32)
    assert value.nbytes > CHUNK_BYTES
    stop.edit(set=value)
    again = server.load(session.save(tmp_path / "one"))
    assert again.stop is not None
    np.testing.assert_array_equal(again.stop.value.numpy(), value)


def test_a_recipe_says_where_a_replay_differs_first(server, stopped, tmp_path):
    recipe = stopped.recipe()
    path = recipe.save(tmp_path / "one")
    assert [seen.location for seen in recipe.stops] == ["layers.1.output", "layers.3.output"]
    assert server.replay(path).same
    assert server.replay(recipe).first_difference is None

    file = path / "session.json"
    content = json.loads(file.read_text())
    content["about"]["stops"][1]["sha256"] = "0" * 64
    content["sha256"] = checkpoints._digest(content)
    file.write_text(json.dumps(content))
    replayed = server.replay(path)
    assert not replayed.same and replayed.first_difference == recipes.read(path).stops[1]
    assert "layers.3.output of forward 0" in repr(replayed)
    with pytest.raises(errors.BrokenCheckpoint, match="without hashes"):
        recipes.read(stopped.save(tmp_path / "plain"))


def test_a_replay_with_other_tokens_names_the_forward(server, tmp_path):
    session = server.launch(PROMPT, max_new_tokens=6)
    session.run_to("logits")
    session.run_to("layers.2.output")
    session.run_to("logits")
    session.run_to("layers.2.output")
    path = session.recipe().save(tmp_path / "one")
    file = path / "session.json"
    content = json.loads(file.read_text())
    drawn = content["record"]["body"]["generated"]
    content["record"]["body"]["generated"] = [drawn[0], (drawn[1] + 1) % 500]
    content["sha256"] = checkpoints._digest(content)
    file.write_text(json.dumps(content))
    fingerprint = {"$dict": session.client.model.fingerprint | {"torch": "1.0"}}
    other = changed(path, tmp_path / "two", fingerprint=fingerprint)
    assert server.replay(other).first_difference == 1


def test_a_running_session_is_not_saved(server, long_session, tmp_path):
    with pytest.raises(errors.StillRunning):
        long_session.continue_(timeout=0.1)
    with pytest.raises(errors.NotStopped, match="pause it first"):
        long_session.save(tmp_path / "one")
    long_session.pause()
    assert long_session.save(tmp_path / "one").is_dir()
