"""The same server as a Ray Serve deployment, for more than one process or machine.

Every replica builds its own pool from the same folder, batches what reaches it, and watches the folder, so that
all replicas pick up a new adapter. From the command line:

    serve run alore_ext.serving.ray:build_app backbone=tiny_vit adapters=/srv/adapters replicas=2

Arguments are the fields of `ServerOptions`, which `alore-ext serve --help` explains, ``replicas``, and ``num_gpus``,
the GPUs that Ray gives each replica. `adapters` must be the folder's path on every machine that runs a replica.

Metrics: each replica counts for itself, and GET /metrics through Ray's proxy is answered by any one of them. With one
replica Prometheus may scrape it there; with more, scrape Ray's own metrics, which tell replicas apart
(``ray_serve_deployment_request_counter_total`` and others, on the port that ``ray start --metrics-export-port`` names).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from alore_ext.training.errors import InputError, require

from .launch import ServerOptions, open_server

__all__ = ["build_app", "parse_arguments"]

_WATCH_S = 5.0


def build_app(arguments: Mapping[str, Any]) -> Any:
    """A Ray Serve application.

    Args:
        arguments: names and values of `ServerOptions`, as strings or as they are; ``replicas`` (default 1);
            ``num_gpus`` of each, which may be a fraction. By default 0 for ``device=cpu``, 1 for ``device=cuda``, and
            for ``auto`` 1 if the machine that this runs on has a GPU: give it where the replicas' machines are others.

    Raises:
        InputError: ray is missing, an argument is unknown, or a value cannot be used.
    """
    serve = require("ray.serve", extra="ray")
    options, replicas, num_gpus = parse_arguments(arguments)

    def replica_app():  # runs in the replica: neither a model nor a FastAPI application can be sent there
        return open_server(options).app()

    @serve.deployment(
        name="alore_ext",
        num_replicas=replicas,
        # The server's own bound answers with 429; Ray's would hold requests back where no metric sees them.
        max_ongoing_requests=2 * options.max_queue,
        ray_actor_options={"num_gpus": _default_gpus(options.device) if num_gpus is None else num_gpus},
    )
    @serve.ingress(replica_app)
    class Replica:
        pass

    return Replica.bind()


def parse_arguments(arguments: Mapping[str, Any]) -> tuple[ServerOptions, int, float | None]:
    """Options, the number of replicas, and the GPUs of each; None where they are not given.

    Raises:
        InputError: names the argument.
    """
    known = {field.name: field.type for field in fields(ServerOptions)}
    values = dict(arguments)
    replicas = _convert("replicas", values.pop("replicas", 1), "int")
    if replicas < 1:
        raise InputError(f"replicas must be at least 1, got {replicas}")
    num_gpus = values.pop("num_gpus", None)
    if num_gpus is not None:
        num_gpus = _convert("num_gpus", num_gpus, "float")
        if not 0 <= num_gpus < math.inf:
            raise InputError(f"num_gpus must be a number from 0 on, got {num_gpus}")
    if unknown := sorted(values.keys() - known.keys()):
        raise InputError(f"unknown argument {unknown[0]}; known: replicas, num_gpus, {', '.join(known)}")
    for name in ("backbone", "adapters"):
        if name not in values:
            raise InputError(f"{name}=... is needed")
    if values.get("reload_token") is not None:
        raise InputError("reload_token: a call would reach one replica of many; all of them watch the folder (watch_s)")
    options = ServerOptions(**{name: _convert(name, value, str(known[name])) for name, value in values.items()})
    return options if options.watch_s is not None else replace(options, watch_s=_WATCH_S), replicas, num_gpus


def _default_gpus(device: str) -> int:
    import torch

    return int(device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()))


def _convert(name: str, value: Any, kind: str) -> Any:
    """A command line's string to the field's type, which is its annotation's first word."""
    if not isinstance(value, str):
        return value
    kind = kind.partition(" ")[0]
    try:
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        return {"int": int, "float": float, "str": str}[kind](value)
    except (KeyError, ValueError):
        raise InputError(f"{name} must be of type {kind}, got {value!r}") from None
