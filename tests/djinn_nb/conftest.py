"""A real server process with a tiny random Llama, for all tests of the client."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import djinn_nb as djinn
from kernel_server.protocol.errors import AccessDenied, ConnectionFailed

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from djinn_nb.workbench import Workbench

NUM_LAYERS, HIDDEN, VOCABULARY, CONTEXT = 6, 32, 512, 32_768
#: New tokens of a session that is to be met while it runs: it does for minutes, however long
#: whoever wants to meet it is kept from that.
LONG = 30_000
PROMPT = "When Mary and John went to the store, John gave a drink to"
TEXT = [
    "When Mary and John went to the store, John gave a drink to Mary.",
    "When Anna and Paul went to the park, Paul gave a book to Anna.",
    "Mary went to the store and John went to the park.",
]


def make_model(folder: Path, *, tokenizer: bool = True, dtype: str = "float32") -> Path:
    """Save a Llama of six small layers, with a byte-level tokenizer or without one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,  # so that tokens and layers differ enough to be told apart
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 8, initial_alphabet=alphabet)
    made.train_from_iterator(TEXT * 20, trainer)
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


class Process:
    """A server process that a test may kill."""

    def __init__(self, folder: Path, *flags: str) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.address = f"unix:{folder / 'server.sock'}"
        self._log = (folder / "log").open("wb")
        command = [sys.executable, "-m", "kernel_server", "serve"]
        command += ["--socket", str(folder / "server.sock"), "--kv-memory", "64MiB", *flags]
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[2]
        )

    def connect(self, timeout_s: float = 240.0) -> djinn.Server:
        """Connect once it listens, and wait until the model is loaded."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return djinn.connect(self.address)
            except (ConnectionFailed, AccessDenied):  # the token file comes with the server
                if self.process.poll() is not None or time.monotonic() > deadline:
                    print(Path(self._log.name).read_text())
                    raise
                time.sleep(0.05)

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def process(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("server") / "run"
    made = Process(folder, "--model", str(model_folder), "--prefill-chunk", "8", "--check")
    try:
        made.connect().close()
        yield made
    finally:
        made.end()


@pytest.fixture
def server(process: Process) -> Iterator[djinn.Server]:
    """A connection of its own, and no sessions left behind."""
    with djinn.connect(process.address) as made:
        yield made
        for session_id in made.sessions().index:
            made.attach(session_id).terminate()


@pytest.fixture
def session(server: djinn.Server) -> djinn.Session:
    return server.launch(PROMPT, max_new_tokens=6)


@pytest.fixture
def long_session(server: djinn.Server) -> djinn.Session:
    """One that runs for minutes."""
    return server.launch(PROMPT, max_new_tokens=LONG)


@pytest.fixture
def make_shell() -> Iterator[Callable[[], InteractiveShell]]:
    """Notebooks of their own, without a kernel; the extension is unloaded at the end."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    config = Config()
    config.HistoryManager.enabled = False
    made = []

    def make() -> InteractiveShell:
        made.append(InteractiveShell(config=config))
        return made[-1]

    yield make
    for shell in made:
        shell.run_line_magic("unload_ext", "djinn_nb")


@pytest.fixture
def bench(make_shell: Callable[[], InteractiveShell], server: djinn.Server) -> Workbench:
    """The workbench of a notebook that is connected."""
    from djinn_nb.workbench import workbench

    made = workbench(make_shell())
    made.current.bind("server", server)
    return made


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    def wait(holds: Callable[[], bool], timeout_s: float = 200.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, "it did not come true in time"
            time.sleep(0.01)

    return wait


@pytest.fixture(autouse=True)
def _no_progress_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DJINN_PROGRESS", "0")
    assert "DJINN_TOKEN" not in os.environ
