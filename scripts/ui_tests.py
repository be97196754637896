"""Run the extension's suite (extension/ui-tests, Galata) against what `make lab` starts.

`python -m scripts.ui_tests [--report PATH] [ARGUMENTS OF PLAYWRIGHT]`. Installs the suite's
packages when they are missing or older than their lock file; what is tested is decided there.
Exit status 3: node or Chromium is missing, and nothing ran.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.browser import CHROMIUM_FLAGS, ROOT, chromium_path, lab
from scripts.test_all import CANNOT_RUN

SUITE = ROOT / "extension" / "ui-tests"
#: npm writes this one last
INSTALLED = SUITE / "node_modules" / ".package-lock.json"


def missing() -> list[str]:
    """What this machine lacks for the suite, in words."""
    lacks = [f"no {name}" for name in ("node", "npm") if shutil.which(name) is None]
    if chromium_path() is None:
        lacks.append("no Chromium")
    return lacks


def install() -> None:
    """`npm ci`, unless what is installed is what the lock file says."""
    lock = SUITE / "package-lock.json"
    if INSTALLED.exists() and INSTALLED.stat().st_mtime >= lock.stat().st_mtime:
        return
    flags = ["--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run(["npm", "ci", *flags], cwd=SUITE, check=True)


def run(arguments: list[str], report: Path | None = None) -> int:
    """Start a lab, run the suite against it; returns Playwright's exit status."""
    install()
    config = SUITE / "jupyter_server_config.py"
    with lab(f"--config={config}", open_to_all=True) as running:
        environment = running.environment()
        environment |= {
            "TARGET_URL": running.address,
            "DJINN_FILES": str(running.files),
            "DJINN_PYTHON": sys.executable,
            "DJINN_CHROMIUM": chromium_path() or "",
            "DJINN_CHROMIUM_FLAGS": " ".join(CHROMIUM_FLAGS),
        }
        if report is not None:
            environment["DJINN_UI_REPORT"] = str(report)
        # Playwright's own way to say: no browser of yours
        environment["PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD"] = "1"
        command = ["npx", "--no-install", "playwright", "test", *arguments]
        return subprocess.run(command, cwd=SUITE, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.ui_tests", description=__doc__)
    parser.add_argument("--report", type=Path, help="where a JUnit report goes")
    chosen, arguments = parser.parse_known_args()
    if lacks := missing():
        print(f"the suite cannot run here: {', '.join(lacks)}", file=sys.stderr)
        return CANNOT_RUN
    return run(arguments, chosen.report)


if __name__ == "__main__":
    sys.exit(main())
