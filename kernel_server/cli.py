"""The command line: serve a model, ask a running server how it is, check a model."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kernel_server.config import (
    DEFAULT_HOST,
    DEFAULT_PORT,
    ModelConfig,
    Quotas,
    ServerConfig,
)
from kernel_server.protocol.durations import parse_seconds
from kernel_server.protocol.errors import BadArgument, DjinnError
from kernel_server.protocol.sizes import parse_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; errors are one line on stderr."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.debug else logging.INFO,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    try:
        return int(options.run(options))
    except DjinnError as error:
        if options.debug:
            raise
        print(f"{error.code}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernel_server",
        description="The Djinn kernel server: runs a model that can be stopped at any layer.",
    )
    commands = parser.add_subparsers(required=True, metavar="serve|status|sessions|selftest|doctor")

    serve = commands.add_parser("serve", help="serve a model (without --model: the bundled one)")
    _add_model(serve)
    _add_address(serve)
    serve.add_argument("--kv-memory", metavar="SIZE", help="KV page pool, e.g. 2GiB")
    serve.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="a cap over weights, workspace, KV page pool and tensors of stops",
    )
    serve.add_argument(
        "--kept-memory", metavar="SIZE",
        help="tensors of stops: --device-memory leaves so much for them, and those of stops that"
        " sessions left take no more; others are computed again (default: 1GiB, at most a sixteenth"
        " of --device-memory)",
    )  # fmt: skip
    serve.add_argument(
        "--host-memory", metavar="SIZE", help="KV pages of sessions that left the device"
    )
    serve.add_argument("--disk-memory", metavar="SIZE", help="KV pages that left the host too")
    serve.add_argument("--disk-path", type=Path, metavar="FOLDER", help="where their file is")
    serve.add_argument(
        "--idle-after",
        metavar="DURATION",
        default="30s",
        help="a session left alone so long leaves the device (default 30s; 0: never for that)",
    )
    serve.add_argument(
        "--lease", metavar="DURATION",
        help="a session not used for so long, such as 8h or 90min, is put to rest on disk: it is"
        " warned of at nine tenths, listed as before, and computed again, bit for bit, when it is"
        " next needed; pinned ones stay (default: all stay)",
    )  # fmt: skip
    serve.add_argument("--prefill-chunk", type=int, metavar="TOKENS", help="default 512")
    serve.add_argument(
        "--decode-bucket", type=int, default=1, metavar="SESSIONS",
        help="sessions decoded together; this version runs each alone (1)",
    )  # fmt: skip
    serve.add_argument(
        "--no-cuda-graphs", action="store_true",
        help="begin every kernel of a decode from the host, as stock transformers does",
    )  # fmt: skip
    serve.add_argument(
        "--state-dir", type=Path, metavar="FOLDER",
        help="where the journal is, from which sessions come back after a restart (default: a"
        " folder of yours, by address and model)",
    )  # fmt: skip
    serve.add_argument("--journal-key", help=argparse.SUPPRESS)
    serve.add_argument(
        "--no-journal", action="store_true", help="keep none: sessions end with the server"
    )
    _add_quotas(serve)
    serve.add_argument("--runtime-file", type=Path, help=argparse.SUPPRESS)
    serve.add_argument(
        "--linger-s", type=float, metavar="SECONDS",
        help="end after this long without clients and unfinished sessions (default: never)",
    )  # fmt: skip
    serve.add_argument("--check", action="store_true", help="check every invariant on every event")
    serve.set_defaults(run=_serve)

    status = commands.add_parser("status", help="what a running server serves and holds")
    _add_address(status)
    status.set_defaults(run=_status)

    sessions = commands.add_parser("sessions", help="the sessions of a running server")
    _add_address(sessions)
    sessions.set_defaults(run=_sessions)

    selftest = commands.add_parser("selftest", help="compare a model with stock transformers")
    _add_model(selftest)
    selftest.add_argument("--json", action="store_true", help="print the report as JSON")
    selftest.add_argument(
        "--families", action="store_true", help="print what is known of every family, load nothing"
    )
    selftest.set_defaults(run=_selftest)

    doctor = commands.add_parser("doctor", help="look for what is wrong here, or measure copies")
    doctor.add_argument("--json", action="store_true", help="print it as JSON")
    doctor.add_argument(
        "--bandwidth", action="store_true",
        help="measure host ↔ device, device, shared memory and loopback by chunk size",
    )  # fmt: skip
    doctor.add_argument("--device", metavar="cpu|cuda:N", help="of --bandwidth (default: cuda:0)")
    _add_address(doctor, port=None)
    doctor.set_defaults(run=_doctor)

    for command in (serve, status, sessions, selftest, doctor):
        command.add_argument("--debug", action="store_true", help="log more, show tracebacks")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FOLDER|ID", help="local folder or hub id")
    parser.add_argument("--geometry", metavar="NAME", help="random weights at a true geometry")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--gpu", type=int, metavar="N", help="use GPU N")
    parser.add_argument("--device", metavar="cpu|cuda:N")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")


def _add_address(parser: argparse.ArgumentParser, port: int | None = DEFAULT_PORT) -> None:
    parser.add_argument("--host", default=DEFAULT_HOST, help="loopback only: reach it by ssh -L")
    parser.add_argument(
        "--port", type=_port, default=port, help=f"0: any free one (default {DEFAULT_PORT})"
    )
    parser.add_argument("--socket", type=Path, metavar="PATH", help="a Unix socket instead")


#: serve's flags for what one owner may take: (flag, field of Quotas, unit, help)
_QUOTAS = (
    ("sessions", "sessions", "N", "sessions"),
    ("kv", "kv_bytes", "SIZE", "KV pages (default: all; half of them if there are two owners)"),
    ("transfers", "transfer_bytes", "SIZE", "tensors on their way to or from clients"),
    ("edits", "edit_bytes", "SIZE", "values of edits"),
    ("captures", "capture_bytes", "SIZE", "captures and logs"),
    ("vectors", "vectors", "N", "named vectors on disk"),
    ("vector-bytes", "vector_bytes", "SIZE", "files of named vectors"),
    ("jobs", "jobs", "N", "requests carried out or waiting at a time"),
    ("connections", "connections", "N", "connections; a notebook uses three"),
)


def _add_quotas(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what one owner (the name of an access token) may take")
    for flag, field, unit, meaning in _QUOTAS:
        default = getattr(Quotas(), field)
        if default is not None:
            shown = f"{default >> 30}GiB" if unit == "SIZE" else default
            meaning += f" (default {shown})"
        group.add_argument(f"--{flag}-per-owner", metavar=unit, help=meaning)


def quotas_of(options: argparse.Namespace) -> Quotas:
    """The quotas asked for; what is no positive number or size is refused."""
    given: dict[str, int] = {}
    for flag, field, unit, _ in _QUOTAS:
        text = getattr(options, f"{flag}_per_owner".replace("-", "_"))
        if text is None:
            continue
        value = parse_bytes(text) if unit == "SIZE" else int(text) if text.isdecimal() else 0
        if value < 1:
            raise BadArgument(f"--{flag}-per-owner is {text}: it must be at least 1")
        given[field] = value
    return Quotas(**given)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 0 to 65535")
    return int(text)


def model_config(options: argparse.Namespace) -> ModelConfig:
    """The model asked for; contradictions are refused."""
    if options.gpu is not None and options.device is not None:
        raise BadArgument("give --gpu or --device, not both")
    if options.model is not None and options.geometry is not None:
        raise BadArgument("give --model or --geometry, not both")
    device = options.device if options.gpu is None else f"cuda:{options.gpu}"
    return ModelConfig(
        model=options.model,
        geometry=options.geometry,
        seed=options.seed,
        device=device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )


def _serve(options: argparse.Namespace) -> int:
    for name in ("threads", "prefill_chunk", "decode_bucket"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise BadArgument(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if options.decode_bucket != 1:
        raise BadArgument(
            f"--decode-bucket {options.decode_bucket}: this version decodes each session alone;"
            " leave it at 1"
        )
    config = ServerConfig(
        model=model_config(options),
        quotas=quotas_of(options),
        host=options.host,
        port=None if options.socket else options.port,
        socket=options.socket,
        kv_memory_bytes=parse_bytes(options.kv_memory) if options.kv_memory else None,
        device_memory_bytes=parse_bytes(options.device_memory) if options.device_memory else None,
        kept_memory_bytes=parse_bytes(options.kept_memory) if options.kept_memory else None,
        host_memory_bytes=parse_bytes(options.host_memory) if options.host_memory else 0,
        disk_memory_bytes=parse_bytes(options.disk_memory) if options.disk_memory else 0,
        disk_path=options.disk_path,
        idle_after_s=parse_seconds(options.idle_after) or None,
        lease_s=parse_seconds(options.lease) if options.lease is not None else None,
        prefill_chunk=options.prefill_chunk,
        cuda_graphs=not options.no_cuda_graphs,
        state_dir=options.state_dir,
        journal_key=options.journal_key,
        journal=not options.no_journal,
        threads=options.threads,
        runtime_file=options.runtime_file,
        linger_s=options.linger_s,
        check=options.check,
        debug=options.debug,
    )
    _limit_threads(options.threads)
    from kernel_server.server import serve

    return serve(config)


def _limit_threads(threads: int) -> None:
    """Set the pools' sizes before torch is imported; the fingerprint holds the number."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)


def _status(options: argparse.Namespace) -> int:
    from kernel_server.asking import Asking

    with Asking.at(options.host, options.port, options.socket) as ask:
        for line in ask.status_lines():
            print(line)
    return 0


def _sessions(options: argparse.Namespace) -> int:
    from kernel_server.asking import Asking

    with Asking.at(options.host, options.port, options.socket) as ask:
        for line in ask.session_lines():
            print(line)
    return 0


def _selftest(options: argparse.Namespace) -> int:
    if options.families:
        print(
            (Path(__file__).parent / "models" / "FAMILIES.md").read_text(encoding="utf-8"), end=""
        )
        return 0
    _limit_threads(options.threads)
    from kernel_server.engine.loading import serve
    from kernel_server.kernel import load
    from kernel_server.models.family_table import row

    config = ServerConfig(model=model_config(options), threads=options.threads)
    loaded = load(config, lambda text, fraction: None)
    # raises the reason when the model is refused; a pool is needed only to serve sessions
    report = serve(loaded.model).report
    if options.json:
        print(json.dumps(report.as_dict(), indent=2))
        return 0
    random = " · random weights" if loaded.random_weights else ""
    print(f"{loaded.name}{random} ({report.family}, {report.dtype}, {report.attention})")
    for check in report.checks:
        verdict = "pass" if check.passed else "FAIL"
        print(f"  {verdict}  {check.name:<40} {check.value:.3g} (allowed {check.tolerance:.3g})")
    for note in report.notes:
        print(f"  note  {note}")
    print("\n".join(row(report.family, report).describe()))
    print("every check passed")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    return _bandwidth(options) if options.bandwidth else _findings(options)


def _findings(options: argparse.Namespace) -> int:
    from kernel_server.doctor.findings import Place, examine, report

    named = options.port is not None or options.socket is not None or options.host != DEFAULT_HOST
    port = DEFAULT_PORT if options.port is None else options.port
    found = examine(Place(options.host, port, options.socket, named))
    if options.json:
        print(json.dumps(report(found), indent=2))
    else:
        for one in found:
            print(one.line())
    return int(any(one.verdict == "problem" for one in found))


def _bandwidth(options: argparse.Namespace) -> int:
    from kernel_server.doctor.bandwidth import measure, table

    try:
        found = measure(options.device)
    except ValueError as error:
        raise BadArgument(str(error)) from error
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(table(found)))
    return 0
