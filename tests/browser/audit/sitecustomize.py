"""Write down every address a Python process reaches for; put on PYTHONPATH by the test of it.

Python imports this module at its start, in the lab, its kernels and the kernel server alike. One
line per attempt goes to the file that DJINN_AUDIT names; what counts as leaving the machine is
decided by the test.
"""

import os
import sys

_FILE = os.environ.get("DJINN_AUDIT")
_WATCHED = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


def _note(event: str, arguments: tuple) -> None:
    if event not in _WATCHED:
        return
    # connect and sendto carry the socket first, the others the host
    target = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
    host = target[0] if isinstance(target, tuple) else target
    line = f"{event} {host!r} {os.path.basename(sys.argv[0] if sys.argv else '')}\n"
    handle = os.open(_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(handle, line.encode())
    os.close(handle)


if _FILE:
    sys.addaudithook(_note)
