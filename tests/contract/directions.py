"""Which part may import which, and how a forbidden import is found. Reads source, imports nothing.

The rules are a table; a module that no row covers is itself a finding, so a new part of the
project has to say here what it may lean on.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("djinn_nb", "kernel_server")
_ANYTHING = frozenset({"kernel_server"})
_PROTOCOL = "kernel_server.protocol"

#: part -> what it may import of the project, besides itself. The longest row that fits holds.
ALLOWED: dict[str, frozenset[str]] = {
    # the client: the contract and the wire, nothing that decides or computes
    "djinn_nb": frozenset({_PROTOCOL, "kernel_server.wire"}),
    "kernel_server": frozenset(),
    # the contract, and what carries its bytes
    _PROTOCOL: frozenset(),
    "kernel_server.wire": frozenset({_PROTOCOL}),
    # what is decided
    "kernel_server.state": frozenset({_PROTOCOL}),
    # what is done
    "kernel_server.mapped": frozenset(),
    "kernel_server.models": frozenset({_PROTOCOL, "kernel_server.mapped"}),
    "kernel_server.engine": frozenset(
        {
            _PROTOCOL,
            "kernel_server.mapped",
            "kernel_server.models",
            "kernel_server.state.events",
            "kernel_server.state.instructions",
        }
    ),
    # where the two meet, and what stands around them
    "kernel_server.event_log": frozenset({_PROTOCOL}),
    "kernel_server.transfers": frozenset({_PROTOCOL}),
    "kernel_server.pacing": frozenset(),
    "kernel_server.jobs": frozenset({_PROTOCOL}),
    "kernel_server.doctor": frozenset(
        {_PROTOCOL, "kernel_server.asking", "kernel_server.service", "kernel_server.wire"}
    ),
    "kernel_server.config": frozenset({_PROTOCOL}),
    "kernel_server.vectors": frozenset({_PROTOCOL}),
    "kernel_server.telemetry": frozenset({_PROTOCOL}),
    "kernel_server.version": frozenset(),
    "kernel_server.asking": frozenset({_PROTOCOL, "kernel_server.wire"}),
    "kernel_server.journal_frames": frozenset({_PROTOCOL}),
    "kernel_server.journal": frozenset(
        {_PROTOCOL, "kernel_server.journal_frames", "kernel_server.state.instructions"}
    ),
    "kernel_server.loop": frozenset(
        {
            _PROTOCOL,
            "kernel_server.state",
            "kernel_server.engine",
            "kernel_server.event_log",
            "kernel_server.pacing",
        }
    ),
    "kernel_server.edit_values": frozenset(
        {_PROTOCOL, "kernel_server.loop", "kernel_server.transfers", "kernel_server.vectors"}
    ),
    "kernel_server.gateway": frozenset(
        {
            _PROTOCOL,
            "kernel_server.edit_values",
            "kernel_server.event_log",
            "kernel_server.jobs",
            "kernel_server.loop",
            "kernel_server.pacing",
            "kernel_server.transfers",
            "kernel_server.vectors",
        }
    ),
    "kernel_server.service": frozenset({_PROTOCOL, "kernel_server.pacing", "kernel_server.wire"}),
    # a whole kernel in one process, without sockets
    "kernel_server.kernel": frozenset(
        {
            _PROTOCOL,
            "kernel_server.config",
            "kernel_server.engine",
            "kernel_server.event_log",
            "kernel_server.gateway",
            "kernel_server.journal",
            "kernel_server.loop",
            "kernel_server.models",
            "kernel_server.state",
            "kernel_server.telemetry",
            "kernel_server.tiers",
            "kernel_server.transfers",
            "kernel_server.version",
        }
    ),
    "kernel_server.tiers": frozenset(
        {
            _PROTOCOL,
            "kernel_server.config",
            "kernel_server.engine",
            "kernel_server.state",
            "kernel_server.telemetry",
        }
    ),
    # wiring: only these may import everything
    "kernel_server.server": _ANYTHING,
    "kernel_server.cli": _ANYTHING,
    "kernel_server.__main__": _ANYTHING,
}

#: Modules that run what the bytes they read say.
CODE_FROM_BYTES = frozenset({"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"})

#: Third-party modules a part must never import, not even inside a function.
FORBIDDEN: dict[str, frozenset[str]] = {
    # nothing that turns bytes into code, anywhere
    "kernel_server": CODE_FROM_BYTES,
    "djinn_nb": frozenset({"torch", "transformers", "triton"}) | CODE_FROM_BYTES,
    _PROTOCOL: frozenset({"torch", "transformers", "safetensors", "triton", "rpyc", "pandas"}),
    "kernel_server.state": frozenset(
        {"torch", "transformers", "safetensors", "triton", "rpyc", "pandas"}
        | {"time", "random", "threading", "socket", "asyncio", "os", "io", "secrets", "uuid"}
    ),
    "kernel_server.service": frozenset({"torch", "transformers"}),
    "kernel_server.wire": frozenset({"torch", "transformers", "pickle"}),
}


def _covers(part: str, module: str) -> bool:
    return module == part or module.startswith(part + ".")


def _row(table: dict[str, frozenset[str]], module: str) -> str | None:
    parts = [part for part in table if _covers(part, module)]
    return max(parts, key=len, default=None)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything the file imports, at the top or anywhere inside."""
    name = module_name(path, root)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # `from kernel_server import engine` names a module, `from a.b import thing` may
            # name one: the longer name is judged, and falls under the row of its package.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (
                (node.lineno, a.value) for a in node.args[:1] if isinstance(a, ast.Constant)
            )


def _complaint(module: str, imported: str) -> str | None:
    top = imported.partition(".")[0]
    if top not in PACKAGES:
        banned = [part for part in FORBIDDEN if _covers(part, module) and top in FORBIDDEN[part]]
        return f"{module} must not import {top}" if banned else None
    own = _row(ALLOWED, module)
    if own is None:
        return f"{module} has no row in ALLOWED: say what it may import"
    if own not in PACKAGES and _covers(own, imported):
        return None
    if own == top == "djinn_nb":
        return None
    if imported == "kernel_server":
        return None  # the bare package, which imports nothing itself
    if any(_covers(part, imported) for part in ALLOWED[own]):
        return None
    return f"{module} must not import {imported}"


def violations(root: Path) -> list[str]:
    """Every import in the packages under `root` that the tables forbid, with file and line."""
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            module = module_name(path, root)
            if _row(ALLOWED, module) in (None, "kernel_server") and module != "kernel_server":
                found.append(f"{module}: no row in ALLOWED says what it may import")
            for line, imported in imports_of(path, root):
                if complaint := _complaint(module, imported):
                    found.append(f"{path.relative_to(root)}:{line}: {complaint}")
    return found
