"""Build the JupyterLab extension, test it, and keep what is built beside what it was built from.

`python -m scripts.extension build` and `check [--report PATH]` need node; `place` does not. What is
built is committed (extension/prebuilt), so that neither `make lab` nor the wheel needs node; the
digest of its sources lies in it, and `tests/contract/test_extension.py` compares the two.
Exit status 3: node is missing or too old, and nothing ran.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from kernel_server.protocol import typescript
from scripts.test_all import CANNOT_RUN

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "extension"
#: A Jupyter data folder; `scripts.lab` shows it to the lab it starts.
PREBUILT = FOLDER / "prebuilt"
NAME = "djinn-nb"
BUILT = PREBUILT / "labextensions" / NAME
DIGEST = "built-from.json"
#: What a build depends on, below `extension/`.
SOURCES = (
    *("package.json", "package-lock.json", "builder.config.js", "tsconfig.json"),
    *("src/**/*.ts", "src/**/*.tsx", "schema/*.json", "style/*.css", "style/*.js"),
)
#: What the builder says it needs; Debian 12 has 18.
NODE = "node 20.19 or later, or 22.12 or later"
#: npm writes this one last.
INSTALLED = FOLDER / "node_modules" / ".package-lock.json"


def digest() -> str:
    """Of everything a build is made from.

    >>> len(digest())
    64
    """
    found = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(FOLDER.glob(pattern)):
            found.update(path.relative_to(FOLDER).as_posix().encode() + b"\0")
            found.update(path.read_bytes() + b"\0")
    return found.hexdigest()


def built_from() -> str | None:
    """The digest of what the build was made from; None where there is none."""
    try:
        found: str = json.loads((BUILT / DIGEST).read_text(encoding="utf-8"))["sources"]
    except FileNotFoundError:
        return None
    return found


def lacking() -> str | None:
    """What this machine lacks for a build, in words; None: nothing."""
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    if missing:
        return f"no {' and no '.join(missing)}: the extension is built with {NODE}"
    said = subprocess.run(["node", "--version"], capture_output=True, text=True).stdout.strip()
    numbers = re.fullmatch(r"v(\d+)\.(\d+)\..*", said)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if version >= (22, 12) or (20, 19) <= version < (21, 0):
        return None
    return f"node here is {said or 'not answering'}: the extension is built with {NODE}"


def environment() -> Mapping[str, str]:
    """With the tools of this interpreter's environment first: `jupyter-builder` is one."""
    found = dict(os.environ)
    found["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), found.get("PATH", "")])
    return found


def npm(*arguments: str, **variables: str) -> int:
    """Run npm in the extension's folder; its output passes through."""
    print(f"npm {' '.join(arguments)}", flush=True)
    command = ["npm", *arguments]
    return subprocess.run(command, cwd=FOLDER, env={**environment(), **variables}).returncode


def install() -> int:
    """`npm ci`, unless what is installed is what the lock file says."""
    lock = FOLDER / "package-lock.json"
    if INSTALLED.exists() and INSTALLED.stat().st_mtime >= lock.stat().st_mtime:
        return 0
    return npm("ci", "--ignore-scripts", "--no-audit", "--no-fund")


def build() -> int:
    """Write the types, build, and note what it was built from."""
    typescript.main([])
    # read before the build: a source saved meanwhile makes the result stale, not fresh
    sources = digest()
    before = _contents(BUILT)
    shutil.rmtree(BUILT, ignore_errors=True)
    if status := npm("run", "--silent", "build"):
        # what was there works, and what a build broke off in does not
        shutil.rmtree(BUILT, ignore_errors=True)
        for name, content in before.items():
            (BUILT / name).parent.mkdir(parents=True, exist_ok=True)
            (BUILT / name).write_bytes(content)
        return status
    text = json.dumps({"sources": sources}, indent=2) + "\n"
    (BUILT / DIGEST).write_text(text, encoding="utf-8")
    shutil.copy(FOLDER / "install.json", BUILT)
    return 0


def place() -> int:
    """Put what is built where a `jupyter lab` of this environment finds it.

    An editable install has copied it there once, when it was made.
    """
    target = Path(sys.prefix) / "share" / "jupyter" / "labextensions" / NAME
    if target.is_symlink():
        target.unlink()
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(BUILT, target)
    return 0


def check(report: Path | None) -> int:
    """Layout, lint, types, unit tests; and whether a build gives what is committed."""
    failed = [name for name in ("lint", "types") if npm("run", "--silent", name)]
    if npm("run", "--silent", "test", NODE_TEST_FLAGS=_reporters(report)):
        failed.append("test")
    before = _contents(BUILT)
    if build():
        failed.append("build")
    elif before != _contents(BUILT):
        print("extension/prebuilt was not what its sources build; commit what is there now")
        failed.append("prebuilt")
    for name in failed:
        print(f"the extension: {name} failed", file=sys.stderr)
    return 1 if failed else 0


def _reporters(report: Path | None) -> str:
    """Flags for node's test runner: what is shown, and what is written down."""
    shown = "--test-reporter=spec --test-reporter-destination=stdout"
    if report is None:
        return shown
    return f"{shown} --test-reporter=junit --test-reporter-destination={report}"


def _contents(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.extension", description=__doc__)
    parser.add_argument("what", choices=("build", "check", "place"))
    parser.add_argument("--report", type=Path, help="check: where a JUnit report goes")
    chosen = parser.parse_args()
    if chosen.what == "place":
        return place()
    if (lacks := lacking()) is not None:
        print(f"{lacks}. What is committed in extension/prebuilt works without.", file=sys.stderr)
        return CANNOT_RUN
    if status := install():
        return status
    if chosen.what == "check":
        return check(chosen.report)
    return build() or place()


if __name__ == "__main__":
    sys.exit(main())
