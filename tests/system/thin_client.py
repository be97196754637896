"""What runs in an environment of the client alone: the tour, and a count of what it receives.

    python thin_client.py ADDRESS NOTEBOOK

Knows nothing of the tests around it; prints one line of JSON.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from kernel_server.wire.frames import GuardedStream

PROMPT = "When Mary and John went to the store, John gave a drink to"


class Counted:
    """Bytes of frames that came in on every connection of this process."""

    def __init__(self) -> None:
        self.received = 0
        read = GuardedStream.read_until

        def counting(stream: GuardedStream, count: int, deadline: float) -> memoryview:
            view = read(stream, count, deadline)
            self.received += count
            return view

        GuardedStream.read_until = counting  # type: ignore[method-assign]

    def during(self, call: Any) -> tuple[Any, int]:
        """What `call` answers, and what came in meanwhile, late events included."""
        before = self.received
        answer = call()
        time.sleep(0.4)
        return answer, self.received - before


def tour(address: str, notebook: Path) -> int:
    """Run every cell of the notebook against the server at `address`; returns how many."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        source = "".join(cell["source"]).replace("%djinn_connect\n", f"%djinn_connect {address}\n")
        result = shell.run_cell(source, store_history=True)
        if not result.success:
            raise SystemExit(f"cell {number} failed: {source[:200]}")
    return len(cells)


def stops(address: str, counted: Counted) -> dict[str, Any]:
    """Bytes of stops by breakpoint and by step, and of the data that is asked for then."""
    import djinn_nb as djinn

    with djinn.connect(address) as server:
        server.model  # noqa: B018 - asked for once, whatever is done later
        session = server.launch(PROMPT, max_new_tokens=4)
        session.break_at(20)
        stop, at_breakpoint = counted.during(session.continue_)
        _, summary = counted.during(lambda: repr(stop.hidden_states))
        array, data = counted.during(lambda: stop.hidden_states.numpy())
        again, row = counted.during(lambda: stop.hidden_states[-1].numpy())
        steps = [counted.during(session.next)[1] for _ in range(3)]
        session.terminate()
    return {
        "stop": at_breakpoint,
        "steps": steps,
        "summary": summary,
        "data": data,
        "data_weighs": array.nbytes,
        "row": row,
        "row_weighs": again.nbytes,
    }


def main() -> None:
    address, notebook = sys.argv[1:]
    counted = Counted()
    found = stops(address, counted)
    found["cells"] = tour(address, Path(notebook))
    found["received"] = counted.received
    names = ("torch", "transformers", "safetensors.torch", "tokenizers")
    found["importable"] = [name for name in names if _importable(name)]
    found["loaded"] = [name for name in ("torch", "transformers") if name in sys.modules]
    print(json.dumps(found))


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None and bool(__import__(name))
    except ImportError:
        return False


if __name__ == "__main__":
    main()
