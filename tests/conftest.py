"""What holds for every test: one thread, no hub, no user's files, and GPU tests that say they did
not run. Fixtures of one part live in that part's own conftest."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

# Before anything imports torch: the engine's exact mode is defined for a fixed thread count, and
# several tests beside each other must not fight over two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a hub is wrong
os.environ["JUPYTER_PLATFORM_DIRS"] = "1"  # what jupyter_core will do next; silences its warning

import pytest

from scripts.private_runtime import end_servers

_NO_GPU = "no CUDA device here"

# A GPU host may have only what the engine needs.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # An example may take long beside other work; the test's own time limit is enough. The same
    # examples in every run: a rare fault is looked for with `--hypothesis-profile=search`, which
    # draws others each time, and does not turn up in somebody's unrelated change.
    slow = [HealthCheck.too_slow]
    settings.register_profile("search", deadline=None, suppress_health_check=slow)
    settings.register_profile("djinn", settings.get_profile("search"), derandomize=True)
    settings.load_profile("djinn")
_user_folders: Path | None = None


def pytest_configure() -> None:
    """Give the run user folders of its own, before any fixture of any scope starts a server.

    Tokens, runtime files and journals must never be the user's. Caches stay where they are: the
    font cache of matplotlib takes seconds to build.
    """
    global _user_folders
    _user_folders = Path(tempfile.mkdtemp(prefix="djinn-test-"))
    os.environ.update(_made_folders(_user_folders))
    for variable in ("DJINN_TOKEN", "DJINN_DEBUG"):
        os.environ.pop(variable, None)
    # A shell starts what it runs in the background deaf to interrupts, and all that starts too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _made_folders(folder: Path) -> dict[str, str]:
    """Make a user's folders; returns the variables that name them."""
    variables = {
        "XDG_DATA_HOME": "data",
        "XDG_STATE_HOME": "state",
        "XDG_CONFIG_HOME": "config",
        "XDG_RUNTIME_DIR": "run",
        "IPYTHONDIR": "ipython",
    }
    for name in variables.values():
        (folder / name).mkdir(mode=0o700)
    return {variable: str(folder / name) for variable, name in variables.items()}


@pytest.fixture
def own_user_folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user of this test's own: tokens, vectors and embedded servers that no other test meets.

    For what runs as a user would, and so leaves named vectors behind.
    """
    # not tmp_path: its name may be too long for a socket
    folder = Path(tempfile.mkdtemp(prefix="djinn-user-"))
    for variable, made in _made_folders(folder).items():
        monkeypatch.setenv(variable, made)
    yield folder
    end_servers(folder / "run")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """What a test draws without a seed does not depend on which tests ran before it."""
    random.seed(0)
    for name, seed in (("numpy", "random.seed"), ("torch", "manual_seed")):
        if name in sys.modules:
            attrgetter(seed)(sys.modules[name])(0)


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """Whatever thread the test started has ended, soon after all else is taken down."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(30)

    assert not set(threading.enumerate()) - before


def pytest_unconfigure() -> None:
    if _user_folders is not None:
        end_servers(_user_folders / "run")
        shutil.rmtree(_user_folders, ignore_errors=True)


def _cuda_is_here() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def pytest_report_header() -> list[str]:
    """What a saved log must say of where it was made."""
    try:
        import torch
        import transformers
    except ImportError:
        return ["torch: not installed"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return [f"torch {torch.__version__}, transformers {transformers.__version__}, {device}"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the GPU tests where there is no GPU; torch is imported only if there are any."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _cuda_is_here():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=_NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in words what a green run has not shown."""
    skipped = terminalreporter.stats.get("skipped", [])
    not_run = sum(_NO_GPU in str(report.longrepr) for report in skipped)
    if not_run:
        terminalreporter.write_sep("!", f"{not_run} GPU tests did NOT run: {_NO_GPU}", yellow=True)
