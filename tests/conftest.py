"""What holds for every test: one thread, no hub, no user's files, and GPU tests that say they did
not run. Fixtures of one part live in that part's own conftest."""

from __future__ import annotations

import os

# Before anything imports torch: the engine's exact mode is defined for a fixed thread count, and
# several tests beside each other must not fight over two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a hub is wrong
os.environ["MPLBACKEND"] = "Agg"
os.environ["JUPYTER_PLATFORM_DIRS"] = "1"  # what jupyter_core will do next; silences its warning

import pytest

_NO_GPU = "no CUDA device here"


def _cuda_is_here() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


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


@pytest.fixture(autouse=True)
def _own_user_folders(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, runtime files and caches of a test go to a folder of its own, never the user's."""
    home = tmp_path_factory.mktemp("user")
    for variable in ("XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(home / variable.lower()))
    runtime = home / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
