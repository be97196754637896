"""`connect`: from an address, or from wishes, to a `Server` that is ready.

With an address the server is where it is and serves what it serves; without one the embedded server
is found or started. Either way `connect` waits until the model is loaded, and shows how far it is.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from djinn_nb import embedded
from djinn_nb.client import Client
from djinn_nb.progress import Progress
from djinn_nb.server import Server
from djinn_nb.transport import START, Transport
from kernel_server.protocol import messages as m
from kernel_server.protocol.codec import rebuild_error
from kernel_server.protocol.errors import BadArgument, NoServer
from kernel_server.wire import find_token

#: Pause between two questions how far the model is loaded, seconds.
ASK_S = 0.1


def connect(
    address: str | None = None,
    *,
    token: str | None = None,
    model: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    **options: Any,
) -> Server:
    """Connect to a kernel server, and wait until its model is loaded.

    address: "host:port" or "unix:/path"; without one, the embedded server on this machine is found
    or started: with the bundled model, or with `model=` (a folder or hub id), `device=` ("cpu",
    "cuda:0"), `dtype=` ("float32", "bfloat16") and options such as kv_memory="2GiB",
    prefill_chunk=512, geometry="llama-2-13b", seed=0. Other wishes start another server.
    With an address, `model`, `device` and `dtype` only check that it serves that one.
    token: the access token; otherwise $DJINN_TOKEN, or the token file of this user.

    Raises NoServer, AccessDenied, ModelNotFound, UnsupportedModel, BadArgument.

        server = djinn_nb.connect()
        server = djinn_nb.connect("gpu-box:5556")
        server = djinn_nb.connect(model="path/to/folder", dtype="bfloat16")
    """
    if token is not None and not isinstance(token, str):
        raise BadArgument(f"a token is a text, not a {type(token).__name__}")
    wanted = embedded.Wanted.of(_path(model), device, dtype, options)
    if address is None:
        address, client = _open_embedded(wanted, token)
    else:
        if not isinstance(address, str):
            raise BadArgument(f"an address is a text such as 'gpu-box:5556', not {address!r}")
        if options:
            raise BadArgument(
                f"options ({', '.join(options)}) start a server; the one at {address} runs"
                " already: leave them out, or leave the address out"
            )
        client = open_client(address, token)
    try:
        _wait_until_ready(client, address)
        if model is not None or device is not None or dtype is not None:
            _check_served(client.model, wanted, address)
        return Server(client)
    except BaseException:
        client.close()
        raise


def open_client(address: str, token: str | None = None, advice: str = START) -> Client:
    """An authenticated client of a server that may still load its model. advice: `Transport`'s."""
    transport = Transport(address, find_token(token), advice=advice)
    try:
        return Client(transport, name=f"djinn_nb of process {os.getpid()}")
    except BaseException:
        transport.close()
        raise


def _open_embedded(wanted: embedded.Wanted, token: str | None) -> tuple[str, Client]:
    """The embedded server's address, and a client of it.

    It ends by itself when nobody is there, maybe just when it was found: then it is started again.
    """
    address = embedded.find_or_start(wanted)
    try:
        return address, open_client(address, token, embedded.RESTART)
    except NoServer:
        address = embedded.find_or_start(wanted)
        return address, open_client(address, token, embedded.RESTART)


def _wait_until_ready(client: Client, address: str) -> None:
    found = client.initialized
    with Progress("loading the model", unit="%") as progress:
        while found.phase == "loading":
            progress.at(100 * found.fraction, 100, found.progress)
            time.sleep(ASK_S)
            found = client.initialize()
    if found.phase == "failed":
        if found.error is not None:
            raise rebuild_error(found.error)
        raise NoServer(f"the server at {address} could not load its model; see its log")


def _check_served(info: m.ModelInfo, wanted: embedded.Wanted, address: str) -> None:
    """The server has the model, device and dtype asked for, or BadArgument."""
    if wanted.model is not None and not _same_model(info.name, wanted.model):
        raise BadArgument(
            f"{address} serves {info.name}, not {wanted.model}: leave model out, or connect to a"
            " server that serves it"
        )
    if wanted.dtype is not None and info.dtype != wanted.dtype:
        raise BadArgument(f"{address} serves {info.name} in {info.dtype}, not {wanted.dtype}")
    if wanted.device is not None and info.device.split(":")[0] != wanted.device.split(":")[0]:
        raise BadArgument(f"{address} serves {info.name} on {info.device}, not {wanted.device}")


def _same_model(served: str, wanted: str) -> bool:
    """The same hub id, the same folder, or a folder of the same name on another machine."""
    return served == wanted or Path(served).name == Path(wanted).name


def _path(model: str | os.PathLike[str] | None) -> str | None:
    if model is not None and not isinstance(model, (str, os.PathLike)):
        raise BadArgument(f"model is a folder or hub id, not {model!r}")
    return None if model is None else os.fspath(model)
