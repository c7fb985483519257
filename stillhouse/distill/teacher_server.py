"""Serve a teacher to many points: hidden states of their sequences, and sequences of its own.

    GET  /manifest   JSON: which teacher it is
    GET  /head       safetensors: its head
    POST /hidden     JSON of token ids -> safetensors: hidden states [N, H] in its dtype
    POST /write      JSON of prompts and of the names of random numbers -> JSON of completions

A request is scored in the batch that its point formed, by as many threads as the point has, so the
answer has the bits that the point would have computed. An answer depends on its request alone, so
whoever got none asks again. At most `WAITING` requests are at work or wait; others are told to come
later (503). Every request names the token.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import uvicorn
from safetensors.torch import save
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stillhouse.distill import models
from stillhouse.distill.engine import Engine
from stillhouse.distill.teacher import DIFFERENT, Draws, ModelTeacher, described, probe
from stillhouse.distill.teacher_cache import head_tensors
from stillhouse.distill.teacher_client import NAME, VERSION
from stillhouse.errors import ConfigError, StillhouseError
from stillhouse.identity import digest
from stillhouse.rundir import Json
from stillhouse.spec import RolloutSpec, TrainSpec

WAITING = 64  # requests that are at work or wait; more are told to come later
LARGEST = 2**26  # bytes of a request: ten million token ids
LATER_S = 1  # after which a request that was sent away may come again
PORT = 8765
SHORTEST_TOKEN = 16  # characters


class Server:
    """The answers of one model."""

    def __init__(self, model: Any, described: Json, token: str, workers: int) -> None:
        """`workers` requests are computed at once."""
        self.model, self.token = model, token
        self.engine, self.writing = Engine(model), threading.Lock()
        self.manifest = described | {"probe": probe(self._teacher(0, []))}
        self.name = digest({name: described[name] for name in DIFFERENT})
        self.count = 0  # requests at work or waiting
        self.pool = ThreadPoolExecutor(workers)

    def app(self) -> Starlette:
        """The web application."""
        ways: list[tuple[str, str, Callable[[Any], tuple[bytes, str]]]] = [
            ("GET", "/manifest", self._manifest), ("GET", "/head", self._head),
            ("POST", "/hidden", self._hidden), ("POST", "/write", self._write),
        ]  # fmt: skip
        routes = [
            Route(path, functools.partial(self._answer, do=do), methods=[method])
            for method, path, do in ways
        ]
        return Starlette(routes=routes)

    async def _answer(self, request: Request, do: Callable[[Any], tuple[bytes, str]]) -> Response:
        said = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(said, f"Bearer {self.token}".encode()):
            return Response("no such token", 401)
        if self.count >= WAITING:
            return Response("busy", 503, {"retry-after": str(LATER_S)})
        self.count += 1
        try:
            body = bytearray()
            async for part in request.stream():
                body += part
                if len(body) > LARGEST:
                    return Response(f"a request of more than {LARGEST} bytes", 413)
            asked = json.loads(body) if body else None
            loop = asyncio.get_running_loop()
            content, kind = await loop.run_in_executor(self.pool, do, asked)
            return Response(content, 200, {NAME: self.name}, kind)
        except (torch.OutOfMemoryError, MemoryError):
            return Response("its device's memory cannot hold this request; lower micro_batch", 507)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            return Response(f"{type(error).__name__}: {error}", 400)
        finally:
            self.count -= 1

    def _teacher(self, pad_id: int, eos_ids: list[int]) -> ModelTeacher:
        frozen = contextlib.nullcontext
        return ModelTeacher(self.model, self.engine, frozen, pad_id, eos_ids, lambda: None)

    def _manifest(self, _: Any) -> tuple[bytes, str]:
        said = {"version": VERSION, "manifest": self.manifest}
        return json.dumps(said).encode(), "application/json"

    def _head(self, _: Any) -> tuple[bytes, str]:
        return save(head_tensors(self._teacher(0, []).head())), "application/octet-stream"

    def _hidden(self, asked: Any) -> tuple[bytes, str]:
        models.use_threads(asked["threads"])  # of this thread of the pool
        teacher = self._teacher(asked["pad_id"], [])
        hidden_NH = teacher.hidden(*asked["rows"], alone=asked["alone"])
        return save({"hidden": hidden_NH.cpu().contiguous()}), "application/octet-stream"

    def _write(self, asked: Any) -> tuple[bytes, str]:
        models.use_threads(asked["threads"])
        teacher = self._teacher(asked["pad_id"], asked["eos_ids"])
        settings: Any = {"prefixes": asked["prefixes"], "greedy": asked["greedy"]}
        with self.writing:  # one copy of the model, and one state of it
            written = teacher.write(
                asked["prompts"],
                Draws(*asked["draws"]),
                RolloutSpec(**asked["rollout"]),
                **settings,
            )
        return json.dumps(astuple(written)).encode(), "application/json"


def serve_at_url(spec: TrainSpec) -> int:
    """Serve the teacher of a spec's pair at its `teacher_url`, to whoever has the token of
    STILLHOUSE_TEACHER_TOKEN, until SIGTERM or SIGINT; 0.

    Raises:
        ConfigError: there is no such token, nothing can listen there, or no weights are here.
        ContractError: the teacher's weights are damaged.
    """
    token = os.environ.get("STILLHOUSE_TEACHER_TOKEN", "")
    if len(token) < SHORTEST_TOKEN:
        raise ConfigError(
            f"stillhouse teacher: STILLHOUSE_TEACHER_TOKEN is the token of {SHORTEST_TOKEN} or more"
            " characters that points must show; `openssl rand -hex 16` makes one"
        )
    url = spec.scoring.teacher_url or f"http://127.0.0.1:{PORT}"
    host, _, port = url.removeprefix("http://").partition(":")
    try:
        listening = socket.create_server((host, int(port)))
    except OSError as error:
        raise ConfigError(
            f"stillhouse teacher: cannot listen at {url}: {error.strerror}"
        ) from error
    return _run(_loaded(spec, token).app(), listening, spec.pair.pair_name)


def serve(spec: TrainSpec, listening: socket.socket, token: str) -> int:
    """The same on a socket that a launcher holds. A teacher that cannot be loaded is refused in
    words to whoever asks for it, who would wait for it otherwise."""
    try:
        app = _loaded(spec, token).app()
    except StillhouseError as error:
        why = f"{type(error).__name__}: {error}"
        print(why, flush=True)

        async def refuse(_: Request) -> Response:
            return Response(why, 409)

        app = Starlette(routes=[Route("/{path}", refuse, methods=["GET", "POST"])])
    return _run(app, listening, spec.pair.pair_name)


def _loaded(spec: TrainSpec, token: str) -> Server:
    models.use_threads(spec.place.threads)
    device, cache_dir = models.pick_device(), Path(spec.place.cache_dir)
    prepared = models.prepare(spec.pair, spec.quant, cache_dir, spec.place.commits)
    files = described(spec.pair, cache_dir, spec.place.commits)
    assert files is not None, "prepare refuses a pair that is not here"
    model = models.load_base(
        prepared.teacher, prepared.teacher_revision, spec.pair.teacher_dtype, None, device
    )
    return Server(model, files, token, _at_once(device, spec.place.threads))


def _run(app: Starlette, listening: socket.socket, name: str) -> int:
    host, port = listening.getsockname()[:2]
    print(f"teacher of pair {name}: process {os.getpid()} at http://{host}:{port}", flush=True)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off",
        timeout_graceful_shutdown=5, timeout_keep_alive=60,
    )  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises it again once it has ended
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def _at_once(device: torch.device, threads: int | None) -> int:
    """How many requests are computed at once: on CPUs, one on as many cores as a point has."""
    if device.type == "cuda":
        return 1
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, cores // (threads or cores))
