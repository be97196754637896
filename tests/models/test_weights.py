"""Model folders, good and broken: each fault has its own typed one-line error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from kernel_server.models.registry import (
    BUNDLED,
    describe_config,
    eos_token_ids,
    max_context,
    module_tree,
    open_model,
)
from kernel_server.models.weights import hash_files
from kernel_server.protocol.errors import (
    BadArgument,
    BrokenModel,
    DjinnError,
    ModelNotFound,
    UnsupportedModel,
)
from tests.models import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    tiny.family("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny.family("llama").save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name, value in changes.items():
        config.pop(name) if value is None else config.update({name: value})
    file.write_text(json.dumps(config))


def test_a_folder_is_loaded_with_its_weights(good: Path) -> None:
    loaded = open_model(str(good), device="cpu")
    expected = tiny.family("llama").state_dict()

    assert not loaded.model.training
    assert loaded.name == good.name
    assert (loaded.tokenizer, loaded.random_weights) == (None, False)
    assert loaded.dtype == torch.float32
    assert all(torch.equal(loaded.model.state_dict()[name], expected[name]) for name in expected)


def test_shards_are_loaded_and_progress_is_told(sharded: Path) -> None:
    told: list[tuple[int, int, str]] = []
    loaded = open_model(
        str(sharded), device="cpu", dtype="bfloat16", progress=lambda *a: told.append(a)
    )

    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert loaded.model.dtype == torch.bfloat16
    assert told[-1][0] == told[-1][1] > 0


def test_the_hash_follows_the_bytes_and_not_the_place(good: Path, folder: Path) -> None:
    same = open_model(str(folder), device="cpu").weights_hash
    assert same == open_model(str(good), device="cpu").weights_hash
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))

    assert open_model(str(folder), device="cpu").weights_hash != same
    assert hash_files([file]) == hash_files([file])


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def half_a_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", ')


def no_model_type(folder: Path) -> None:
    change_config(folder, model_type=None)


def unknown_type(folder: Path) -> None:
    change_config(folder, model_type="nonesuch")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def junk_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")


def missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "gone.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")


def another_width(folder: Path) -> None:
    change_config(folder, intermediate_size=128)


def more_layers(folder: Path) -> None:
    change_config(folder, num_hidden_layers=8)


def quantised(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def encoder_decoder(folder: Path) -> None:
    change_config(folder, model_type="t5", is_encoder_decoder=True)


def encoder_only(folder: Path) -> None:
    change_config(folder, model_type="bert")


def vision(folder: Path) -> None:
    change_config(folder, model_type="vit")


def remote_code(folder: Path) -> None:
    change_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.Config"})


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (no_config, BrokenModel, "no config.json"),
        (half_a_config, BrokenModel, "cannot be read as JSON"),
        (no_model_type, BrokenModel, "names no model_type"),
        (unknown_type, UnsupportedModel, "nonesuch"),
        (no_weights, BrokenModel, "has no weights"),
        (cut_weights, BrokenModel, "damaged"),
        (junk_weights, BrokenModel, "damaged"),
        (pickled_weights, UnsupportedModel, "pickled"),
        (missing_shard, BrokenModel, "gone.safetensors"),
        (broken_index, BrokenModel, "not an index"),
        (another_width, BrokenModel, "do not fit the configuration"),
        (more_layers, BrokenModel, "lacks"),
        (quantised, UnsupportedModel, "quantised (gptq)"),
        (encoder_decoder, UnsupportedModel, "encoder-decoder"),
        (encoder_only, UnsupportedModel, "encoder-only"),
        (vision, UnsupportedModel, "not a causal language model"),
        (remote_code, UnsupportedModel, "--trust-remote-code"),
        (broken_tokenizer, BrokenModel, "tokenizer"),
    ],
)
def test_a_folder_that_cannot_be_served_says_why(
    folder: Path, fault: Any, error: type[DjinnError], words: str
) -> None:
    fault(folder)
    with pytest.raises(error) as refused:
        open_model(str(folder), device="cpu")

    assert words.replace("(", "").replace(")", "") in str(refused.value).replace("(", "").replace(
        ")", ""
    )
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"source": "/no/such/folder"}, ModelNotFound, "no folder"),
        ({"source": "./nor/here"}, ModelNotFound, "no folder"),
        ({"source": "nobody/nothing"}, ModelNotFound, "hub id"),
        ({"source": __file__}, ModelNotFound, "is a file"),
        ({"geometry": "llama-9"}, BadArgument, "llama-2-13b"),
        ({"geometry": "gpt2", "source": "x"}, BadArgument, "not both"),
        ({"dtype": "int4"}, BadArgument, "float32, bfloat16 or float16"),
        ({"device": "tpu"}, BadArgument, "cpu, cuda"),
        ({"device": "cuda:77"}, BadArgument, "torch sees"),
        ({"device": "mps"}, BadArgument, "cpu, cuda"),
    ],
)
def test_what_is_asked_for_in_vain_says_so(
    given: dict[str, str], error: type[DjinnError], words: str
) -> None:
    with pytest.raises(error, match=words):
        open_model(**{"device": "cpu", **given})


def test_a_description_holds_configuration_and_shapes_and_no_weights(good: Path) -> None:
    loaded = open_model(str(good), device="cpu")
    config, tree = describe_config(loaded.model), module_tree(loaded.model)

    assert config["num_hidden_layers"] == tiny.LAYERS
    assert json.dumps(config)
    assert ("model.embed_tokens", "Embedding", f"weight [{tiny.VOCAB}, {tiny.HIDDEN}]") in tree
    assert eos_token_ids(loaded.model) == (2,)
    assert max_context(loaded.model) == 256


def test_a_tokenizer_in_the_folder_comes_along(folder: Path) -> None:
    if not (BUNDLED / "tokenizer.json").is_file():
        pytest.skip("the bundled model is not built")
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)

    assert open_model(str(folder), device="cpu").tokenizer.encode("a", add_special_tokens=False)
