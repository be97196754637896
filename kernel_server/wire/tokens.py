"""Access tokens: who may use this server, kept in a file that only its user can read.

The file is JSON, {owner's name: token}. A server makes it on its first start with one owner, the
user; a client on the same machine finds the same file, so nobody types a token for the first run.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

import platformdirs

from kernel_server.protocol.errors import AccessDenied, BadArgument

#: The environment variable a client reads its token from.
TOKEN_VARIABLE = "DJINN_TOKEN"
#: Shorter ones could be found by trying: a server that challenges a client gives it that chance.
MIN_TOKEN_LENGTH = 16


def token_file() -> Path:
    """The file a server and its local clients use unless told otherwise."""
    return platformdirs.user_data_path("djinn", appauthor=False) / "tokens.json"


def new_token() -> str:
    return secrets.token_urlsafe(32)


def load_or_create_tokens(path: Path | None = None) -> dict[str, str]:
    """Read the server's tokens, making the file with one owner when there is none.

    Raises BadArgument when the file is malformed or readable by others.
    """
    path = path or token_file()
    try:
        return _load_or_create(path)
    except OSError as error:  # a full disk, a folder that cannot be written
        raise BadArgument(
            f"the token file {path} cannot be kept ({error.strerror or error}): make room, or set"
            " XDG_DATA_HOME to a folder of your own that can be written"
        ) from error


def _load_or_create(path: Path) -> dict[str, str]:
    with contextlib.suppress(FileNotFoundError):
        return read_tokens(path)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({_user(): new_token()}, file, indent=2)
            file.write("\n")
        # A link, not a rename: of two servers starting at once the second takes the first's file.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)
    return read_tokens(path)


def read_tokens(path: Path) -> dict[str, str]:
    """Read a token file; FileNotFoundError when there is none, BadArgument when it is unfit."""
    with path.open(encoding="utf-8") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if os.name == "posix" and mode & 0o077:
            raise BadArgument(
                f"the token file {path} can be read by others (mode {mode:04o}); "
                f"`chmod 600 {path}`, and make a new token if others have used this machine"
            )
        try:
            tokens = json.load(file)
        except ValueError as error:
            raise BadArgument(f"the token file {path} is no JSON: {error}") from error
    check_tokens(tokens, where=f"the token file {path}")
    return dict(tokens)


def check_tokens(tokens: Mapping[str, str], where: str = "tokens") -> None:
    """Raise BadArgument unless `tokens` names at least one owner, each with a token of its own."""
    if not isinstance(tokens, Mapping) or not tokens:
        raise BadArgument(f"{where}: expected {{owner: token}} with at least one owner")
    for owner, token in tokens.items():
        if not isinstance(owner, str) or not owner or not isinstance(token, str):
            raise BadArgument(f"{where}: owners and tokens are texts")
        if len(token) < MIN_TOKEN_LENGTH:
            raise BadArgument(
                f"{where}: the token of {owner} has {len(token)} characters, "
                f"at least {MIN_TOKEN_LENGTH} are needed"
            )
    if len(set(tokens.values())) != len(tokens):
        raise BadArgument(f"{where}: two owners have the same token")


def find_token(token: str | None = None, path: Path | None = None) -> str:
    """The token a client uses: the one given, else $DJINN_TOKEN, else this user's in the file.

    Raises AccessDenied when none is found, saying where it was looked for.
    """
    given = token or os.environ.get(TOKEN_VARIABLE)
    if given:
        return given.strip()
    path = path or token_file()
    try:
        tokens = read_tokens(path)
    except OSError as error:
        raise AccessDenied(
            f"no access token: none given, {TOKEN_VARIABLE} is not set, and {path} cannot be "
            f"read ({error.strerror}); pass token= or copy the server's token file there"
        ) from error
    if len(tokens) == 1:
        return next(iter(tokens.values()))
    if _user() not in tokens:
        raise AccessDenied(
            f"{path} holds tokens of {', '.join(sorted(tokens))}, none of {_user()}; pass token="
        )
    return tokens[_user()]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without a user database
        return "owner"
