"""A kernel server as the user holds it: launch sessions, find them again, see what it holds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from djinn_nb import checkpoints, recipes
from djinn_nb.checks import flag, real, shown, text_or_none, warn_of_unused, whole
from djinn_nb.client import Client
from djinn_nb.model import Model, model_line, token_id_list
from djinn_nb.planned import Planned
from djinn_nb.prompts import Sessions, is_list_of_prompts
from djinn_nb.recipes import Recipe, Replayed
from djinn_nb.residency import TIERS, Residency
from djinn_nb.session import Session
from djinn_nb.vector_store import VectorStore
from djinn_nb.waiting import Interrupted
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadArgument, BadPrompt, UnknownSession
from kernel_server.protocol.sizes import parse_bytes

if TYPE_CHECKING:
    import pandas as pd

MIB = 1 << 20


class Server(Planned):
    """A connection to one kernel server; made by `djinn_nb.connect()`.

    Used as a context manager it disconnects at the end. Sessions stay with the server either way.

        with djinn_nb.connect() as server:
            session = server.launch("When Mary and John", max_new_tokens=24)
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._model = Model(client)
        client.model  # noqa: B018 - asked now, so that showing things later asks nothing

    @property
    def client(self) -> Client:
        """The connection; calls on it are typed messages of the contract."""
        return self._client

    @property
    def address(self) -> str:
        """Where it listens: `host:port` or `unix:/path`."""
        return str(self._client.transport.address)

    @property
    def model(self) -> Model:
        """The model it serves: config, tokenizer, module tree; no weights."""
        return self._model

    @property
    def vectors(self) -> VectorStore:
        """The named vectors you keep on this server; it makes them too.

        server.vectors.from_prompts("joy", positive=good, negative=bad, location=16)
        server.vectors["joy"].apply(session, alpha=2)
        """
        return VectorStore(self, self._client)

    @overload
    def launch(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        max_new_tokens: int,
        temperature: float = ...,
        top_p: float = ...,
        seed: int | None = ...,
        stop_on_entry: bool = ...,
        add_special_tokens: bool = ...,
        name: str | None = ...,
        messages: Sequence[Mapping[str, str]] | None = ...,
    ) -> Session: ...

    @overload
    def launch(
        self,
        prompt: list[str] | list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float = ...,
        top_p: float = ...,
        seed: int | None = ...,
        stop_on_entry: bool = ...,
        add_special_tokens: bool = ...,
        name: str | None = ...,
    ) -> Sessions: ...

    def launch(
        self,
        prompt: Any = None,
        *,
        max_new_tokens: int,
        temperature: float = 0,
        top_p: float = 1,
        seed: int | None = None,
        stop_on_entry: bool = False,
        add_special_tokens: bool = True,
        name: str | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
    ) -> Session | Sessions:
        """Make a session; it waits until `continue_()`, or stops at once with `stop_on_entry`.

        prompt: a text, or token ids. A list of prompts makes `Sessions`, one for each. messages: a
        conversation instead, each a `role` and `content`, written by the model's own chat template;
        an assistant's message at the end is gone on with. temperature 0 takes the most probable
        token; otherwise the sampler draws by (seed, position) from the smallest set of tokens with
        probability `top_p`.

        Raises BadPrompt, PromptTooLong, NoTokenizer, QuotaExceeded, BadArgument, and NotSupported
        for a conversation where the model has no chat template.

            session = server.launch("When Mary and John", max_new_tokens=24)
            session = server.launch([1, 15, 8], max_new_tokens=8, temperature=0.8, seed=1)
            sessions = server.launch(["Mary went", "John went"], max_new_tokens=8)
            server.launch(messages=[{"role": "user", "content": "Hello"}], max_new_tokens=8)
        """
        wishes = m.Launch(
            max_new_tokens=whole(max_new_tokens, "max_new_tokens"),
            temperature=real(temperature, "temperature"),
            top_p=real(top_p, "top_p"),
            seed=None if seed is None else whole(seed, "seed"),
            stop_on_entry=flag(stop_on_entry, "stop_on_entry"),
            add_special_tokens=flag(add_special_tokens, "add_special_tokens"),
            name=text_or_none(name, "name"),
        )
        made = self._launch(wishes, prompt, messages)
        warn_of_unused(wishes.temperature, seed=seed, top_p=None if wishes.top_p == 1 else top_p)
        return made

    def _launch(self, wishes: m.Launch, prompt: Any, messages: object) -> Session | Sessions:
        if messages is not None:
            if prompt is not None:
                raise BadPrompt("give a prompt or messages, not both")
            return self._launch_one(replace(wishes, messages=_messages(messages)))
        if not is_list_of_prompts(prompt):
            return self._launch_one(_with_prompt(wishes, prompt))
        name = wishes.name

        def launch_numbered(number: int, one: Any) -> Session:
            named = wishes if name is None else replace(wishes, name=f"{name} {number}")
            return self._launch_one(_with_prompt(named, one))

        return Sessions(self, list(prompt), launch_numbered)

    def _launch_one(self, message: m.Launch) -> Session:
        try:
            session = Session(self._client, self._client.control(message))
        except KeyboardInterrupt:
            raise Interrupted(
                "the launch may have made a session, which runs nothing but its entry:"
                " server.sessions() lists it, server.attach(id) gives it"
            ) from None
        if message.stop_on_entry:
            session.wait()
        return session

    def attach(self, id: str | Session, *, inexact: bool = False) -> Session:
        """A session by its id or name, as it stands; it may have been made by another client.

        inexact: let one that was run under another execution fingerprint, before the server was
        started anew, go on here; it is marked ever after. Raises UnknownSession.

            server.attach("s3")
            server.attach("s3", inexact=True)
        """
        found = self._attach(id)
        if flag(inexact, "inexact"):
            self._client.control(m.Accept(session_id=found.id))
        return found

    def _attach(self, id: str | Session) -> Session:
        wanted = id.id if isinstance(id, Session) else id
        if not isinstance(wanted, str):
            raise BadArgument(f"a session is named by its id, a text, not {shown(wanted)}")
        try:
            return Session(self._client, self._client.describe(wanted))
        except UnknownSession:
            named = [info for info in self._infos() if info.name == wanted]
            if len(named) > 1:
                ids = ", ".join(info.id for info in named)
                raise UnknownSession(
                    f"{len(named)} sessions have the name {wanted!r}: attach one by its id ({ids})"
                ) from None
            if not named:
                raise
            return Session(self._client, named[0])

    def load(
        self, path: str | os.PathLike[str], *, name: str | None = None, inexact: bool = False
    ) -> Session:
        """A session from a checkpoint that `session.save(path)` has written, here or elsewhere.

        It stands where it was saved, as a new session; the server computes it again, as it went,
        when its tensors are first needed. inexact: also under another execution fingerprint than it
        ran under; it is marked ever after. Raises BrokenCheckpoint for a folder that is not whole,
        WrongFingerprint with what differs, WrongModel, QuotaExceeded.

            server.load("mary.djinn").continue_()
        """
        found = checkpoints.read(path)
        made = checkpoints.send(
            self._client, found, text_or_none(name, "name"), flag(inexact, "inexact")
        )
        return Session(self._client, made)

    def replay(self, recipe: Recipe | str | os.PathLike[str]) -> Replayed:
        """Do again what a recipe says, and say where it first differs, if anywhere.

        recipe: of `session.recipe()`, or the folder in which one was saved. The session it makes
        stays. Raises what `load()` raises, but not WrongFingerprint.

            server.replay("mary.djinn").first_difference
        """
        return recipes.replay(self, recipe)

    def sessions(self) -> pd.DataFrame:
        """All sessions of yours on this server, one row each, indexed by id."""
        import pandas as pd

        served = self._client.model
        model = served.name + " · random weights" * served.random_weights
        rows = [
            {
                "id": info.id,
                "name": info.name,
                "model": model,
                "status": info.status,
                "location": info.location or "",
                "forward": info.forward,
                "prompt_tokens": info.num_prompt_tokens,
                "new_tokens": len(info.tokens) - info.num_prompt_tokens,
                "max_new_tokens": info.max_new_tokens,
                "seed": info.seed,
                "parent": info.parent or "",
                "pages": info.num_pages,
                "kv_MiB": info.kv_bytes / MIB,
                **{f"{t}_MiB": Residency.of(info).nbytes(t) / MIB for t in TIERS},
                "pinned": info.pinned,
                "note": _note(info),
            }
            for info in self._infos()
        ]
        columns = [
            "id", "name", "model", "status", "location", "forward", "prompt_tokens", "new_tokens",
            "max_new_tokens", "seed", "parent", "pages", "kv_MiB", "device_MiB", "host_MiB",
            "disk_MiB", "pinned", "note",
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=columns).set_index("id")

    def set_budget(
        self,
        *,
        device: int | str | None = None,
        host: int | str | None = None,
        disk: int | str | None = None,
    ) -> pd.DataFrame:
        """Change how much KV each tier may hold, while the server runs; one row per tier named.

        Bytes, or a text such as "2GiB"; at most what was allocated at the start. What a lowered
        tier holds too much leaves as copies are made. Where one of the tiers is refused, none
        changes. Refused where the server has several owners.
        Raises BadArgument with the bounds, OutOfPages where the pages have nowhere to go.

            server.set_budget(device="1GiB")
        """
        import pandas as pd

        asked: dict[Any, Any] = {"device": device, "host": host, "disk": disk}
        sizes = {tier: _size(value, tier) for tier, value in asked.items() if value is not None}
        if not sizes:
            raise BadArgument("name a tier: set_budget(device='1GiB'), host= or disk=")
        # one request: the server looks at all of them before it changes any
        reply = self._client.call(m.SetBudget(**sizes), m.BudgetReply)
        rows = [
            {
                "tier": budget.tier,
                "budget_MiB": budget.nbytes / MIB,
                "used_MiB": budget.used / MIB,
                "allocated_MiB": budget.allocated / MIB,
            }
            for budget in reply.budgets
        ]
        return pd.DataFrame(rows).set_index("tier")

    def swaps(self) -> pd.DataFrame:
        """The swaps this connection was told of, one row each: time, session, bytes, text.

        A swap is a copy of a session's pages between tiers, or their leaving the device; its text
        says how many, how fast and why. Copies made beforehand (write-behind) are not told.
        """
        self._client.catch_up()
        return self._client.mirror.swaps.frame()

    def memory(self) -> pd.DataFrame:
        """What the server holds, by kind: bytes, MiB and a note.

        Every byte of the process: the rows above `host process` add up to it and, on a GPU, those
        above `device used` to that. What has no name of its own is in a row for the rest.
        """
        import pandas as pd

        reply = self._client.call(m.DescribeMemory(), m.MemoryReply)
        rows = [
            {"kind": kind, "bytes": nbytes, "MiB": nbytes / MIB, "note": note}
            for kind, nbytes, note in reply.rows
        ]
        return pd.DataFrame(rows, columns=["kind", "bytes", "MiB", "note"]).set_index("kind")

    def session_names(self) -> list[str]:
        """Ids and names of the sessions, for completion."""
        infos = self._infos()
        return list(dict.fromkeys([i.id for i in infos] + [i.name for i in infos if i.name]))

    def close(self) -> None:
        """Disconnect; sessions stay with the server. Closing twice does nothing."""
        self._client.close()

    @property
    def closed(self) -> bool:
        """Whether this connection was closed; sessions live on without it."""
        return self._client.transport.closed

    def _infos(self) -> tuple[m.SessionInfo, ...]:
        infos = self._client.call(m.ListSessions(), m.Sessions).sessions
        for info in infos:
            self._client.mirror.update(info)
        return infos

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        closed = " · disconnected" if self.closed else ""
        return f"Server {self.address}{closed}\n  {model_line(self._client.model)}"


def _note(info: m.SessionInfo) -> str:
    """What is special about a session: it came back, may not go on, or is not exact."""
    notes = ["inexact"] * info.inexact
    if info.refused is not None:
        notes.append(info.refused)
    elif info.lease_ended:
        notes.append("at rest on disk, its lease ended: computed again when it is needed")
    elif info.dormant:
        notes.append("came back after a restart: computed again when it is needed")
    return "; ".join(notes)


def _size(value: object, name: str) -> int:
    if isinstance(value, str):
        return parse_bytes(value)
    return whole(value, name, least=0)


def _with_prompt(wishes: m.Launch, prompt: object) -> m.Launch:
    text, ids = _prompt(prompt)
    return replace(wishes, prompt=text, token_ids=ids)


def _messages(messages: object) -> tuple[m.ChatMessage, ...]:
    form = "messages are a list of {'role': 'user', 'content': '…'}"
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise BadPrompt(f"{form}, not {shown(messages)}")
    found = []
    for number, one in enumerate(messages):
        if not isinstance(one, Mapping) or set(one) != {"role", "content"}:
            raise BadPrompt(f"{form}; number {number} is {shown(one)}")
        if not all(isinstance(value, str) for value in one.values()):
            raise BadPrompt(f"{form}: role and content are texts, number {number} is {shown(one)}")
        found.append(m.ChatMessage(role=one["role"], content=one["content"]))
    return tuple(found)


def _prompt(prompt: object) -> tuple[str | None, tuple[int, ...] | None]:
    if isinstance(prompt, str):
        if not prompt:
            raise BadPrompt("the prompt is empty: give at least one token")
        return prompt, None
    try:
        ids = tuple(token_id_list(prompt))
    except BadArgument as error:
        raise BadPrompt(
            f"a prompt is a text or a list of token ids, not {shown(prompt)} ({error})"
        ) from None
    if not ids:
        raise BadPrompt("the prompt is empty: give at least one token")
    return None, ids
