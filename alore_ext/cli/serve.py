"""``alore-ext serve``: one backbone and a folder of adapters behind HTTP."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from dataclasses import fields
from pathlib import Path

from alore_ext.serving.launch import DTYPES, Server, ServerOptions, open_server
from alore_ext.serving.settings import option_of
from alore_ext.training.errors import InputError, require

from .options import add_model_options

_EPILOG = """\
examples:
  alore-ext serve --backbone tiny_vit --adapters adapters/
  alore-ext serve --backbone vit_base_patch16_224 --pretrained --adapters adapters/ --device cuda --dtype bf16
  curl -F file=@bird.jpg -F adapter=birds -F top_k=3 http://127.0.0.1:8000/predict
"""


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "serve",
        help="answer HTTP requests with one backbone and a folder of adapters",
        description="Serve a folder of adapters (NAME.safetensors is the adapter NAME) over one backbone: "
        "POST /predict, GET /adapters, /health, /metrics, POST /adapters/reload.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser, "--backbone", "--model")
    parser.add_argument("--adapters", metavar="DIR", required=True, help="folder of adapter files")
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1; 0.0.0.0 for every interface")
    network.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000; 0 for any free port")
    execution = parser.add_argument_group("execution")
    execution.add_argument("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1 (default: auto)")
    execution.add_argument("--dtype", choices=tuple(DTYPES), help="of weights and activations (default: fp32)")
    execution.add_argument(
        "--activate", metavar="NAME", help="merge this adapter into the backbone: batches of it alone run at its speed"
    )
    execution.add_argument(
        "--graph-batches", metavar="N,N", help="with --activate: batch sizes to record as CUDA graphs"
    )
    execution.add_argument(
        "--centre-crop",
        action="store_true",
        help="take the central 7/8 of each image, for adapters trained with --augment crop. Of all adapters of this "
        "server: those trained otherwise belong in another's folder",
    )
    batching = parser.add_argument_group("batching and limits")
    for name, kind, text in (
        ("max_batch", int, "images in one pass"),
        ("max_delay_ms", float, "that the first image of a batch waits for others"),
        ("max_queue", int, "requests admitted at a time: decoded, waiting, in a batch; more get 429"),
        ("max_reading", int, "requests whose bodies are being read at a time; more get 429"),
        ("body_timeout_s", float, "seconds for a request's body to arrive; later gets 408"),
        ("max_request_mb", float, "of a request's body; more gets 413"),
        ("max_megapixels", float, "of an image; more gets 413 before it is decoded"),
        ("decode_threads", int, "that decode images"),
    ):
        default = next(f.default for f in fields(ServerOptions) if f.name == name)
        help_text = f"{text} (default: {default:g})"
        batching.add_argument(option_of(name), dest=name, type=kind, metavar="N", help=help_text)
    reloading = parser.add_argument_group("adapters that come and go")
    reloading.add_argument(
        "--watch", dest="watch_s", type=float, nargs="?", const=2.0, metavar="SECONDS",
        help="look at the folder every SECONDS (2 if none are given)",
    )  # fmt: skip
    token = reloading.add_mutually_exclusive_group()
    token.add_argument(
        "--reload-token-env", metavar="VARIABLE", help="turns on POST /adapters/reload, with the token in VARIABLE"
    )
    token.add_argument("--reload-token-file", metavar="FILE", help="the same, with the token in FILE")
    return parser


def run(arguments: argparse.Namespace) -> int:
    if arguments.model is None:
        raise InputError("--backbone NAME is needed")
    given = {
        field.name: getattr(arguments, field.name)
        for field in fields(ServerOptions)
        if getattr(arguments, field.name, None) is not None
    }
    options = ServerOptions(**given, backbone=arguments.model, reload_token=_token(arguments))
    server = open_server(options)
    listener = _listen(arguments.host, arguments.port)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every malformed body, which gets a 400
    host, port = listener.getsockname()[:2]
    _announce(server, f"http://{f'[{host}]' if ':' in host else host}:{port}")
    _serve(server, listener)
    return 0


def _serve(server: Server, listener: socket.socket) -> None:
    """Answer requests until SIGTERM or SIGINT; then finish those that were accepted."""
    uvicorn = require("uvicorn", extra="serve")
    config = uvicorn.Config(
        server.app(),
        http="h11",  # ends a connection at 64 KiB of headers; httptools keeps all that a client sends
        log_level="warning",
        access_log=False,
        # Of connections, idle ones too, each a file: beyond that 503. By default fewer than the 1,024 files that a
        # process may usually open.
        limit_concurrency=server.options.max_reading + server.options.max_queue + 128,
        timeout_keep_alive=75,  # longer than the 60 s after which common load balancers close idle connections
        timeout_graceful_shutdown=int(server.options.body_timeout_s) + 30,
    )
    # uvicorn shuts down gracefully on these signals, then raises them again: that must not look like a crash.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(server: Server, address: str) -> None:
    options, names = server.options, server.pool.names
    for name, reason in server.report.failed.items():
        print(f"adapter  {name}: not loaded: {reason}", file=sys.stderr)
    shown = f": {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else ""
    print(
        f"backbone {options.backbone}, {server.spec.size}x{server.spec.size}, {options.dtype} on {server.pool.device}\n"
        f"adapters {len(names)} of {options.adapters}{shown}\n"
        f"serving  {address} (POST /predict; GET /adapters, /health, /metrics, /docs)",
        flush=True,
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there: {error}") from error


def _token(arguments: argparse.Namespace) -> str | None:
    if arguments.reload_token_env is not None:
        token = os.environ.get(arguments.reload_token_env)
        if not token:
            raise InputError(f"--reload-token-env: the environment has no {arguments.reload_token_env}")
        return token.strip()
    if arguments.reload_token_file is not None:
        try:
            return Path(arguments.reload_token_file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise InputError(f"--reload-token-file: cannot read {arguments.reload_token_file}: {error}") from error
    return None
