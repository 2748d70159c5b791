"""`raybooth serve`: finds the subjects, starts replicas that draw, and answers until it is stopped."""

import contextlib
import ipaddress
import os
import re
import socket
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth import config as configuration
from raybooth.base_model import local_source
from raybooth.disk import path_of
from raybooth.errors import RayboothError
from raybooth.families import mini_folder
from raybooth.files import files_under
from raybooth.manifest import CONFIG_FILE, read_manifest
from raybooth.serving.schemas import Limits
from raybooth.serving.subjects import MARKS, Subject, Subjects, folder_of, of_base

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI

    from raybooth.cluster.serving import Served
    from raybooth.serving.batcher import Batcher, Drawn, Job
    from raybooth.serving.generations import Draw


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        set: settings for the runs that are started here.
        timeout: seconds that a request may take, from its arrival to its last picture.
        allow_host: names under which it may be asked, besides its own, such as a reverse proxy's.
        replicas: as "2", or "1-4" for fewest and most; None: as many as there are GPUs, or cores for small models.
    """

    paths: Sequence[str]
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    insecure: bool = False
    safety: bool = True
    replicas: str | None = None
    base: str | None = None
    address: str | None = None
    set: Sequence[str] = ()
    timeout: float = Limits.seconds
    allow_host: Sequence[str] = ()


def serve(options: Options) -> None:
    """Serve until Ctrl-C.

    Raises:
        RayboothError: if it may not or cannot start.
    """
    from raybooth.serving.guard import read_keys

    _need_the_extra()
    from raybooth.serving import uploads

    keys = read_keys(options.api_key_file) if options.api_key_file else []
    local = _is_loopback(options.host)
    if not (local or keys or options.insecure):
        raise RayboothError(
            f"--host {options.host} can be reached from other machines, and there are no API keys: give --api-key-file FILE (one key a line), "
            "or --insecure if whoever reaches it may use it."
        )
    listening = _bound(options.host, options.port)  # before the seconds that the rest takes
    fixed = _range(options.replicas)
    subjects = Subjects(options.paths, _base_folder(options.base), say=_say)
    base = subjects.base
    uploads.settings(Path("run"), _section(base), {"class": "thing"}, options.set)  # what is wrong with them shows now, and not to whoever uploads
    safety = _safety_folder(base, options.safety)
    rank = slot_rank(subjects)
    make = partial(make_batcher, options.paths, base, rank, safety)

    from raybooth.cluster.serving import replica_range, served
    from raybooth.cluster.session import connected
    from raybooth.serving.api import create_app
    from raybooth.serving.static import PAGE

    os.environ.setdefault("RAY_worker_niceness", "0")  # by default Ray's workers give way to everything else; people wait for these
    limits, size = Limits(seconds=options.timeout), sum((base.weights / n).stat().st_size for n in files_under(base.weights))
    with connected(options.address) as have:
        fewest, most = fixed or replica_range(have, size)
        how: dict[str, Any] = {"replicas": (fewest, most), "batch": base.batch, "queue": limits.queue, "joined": options.address is not None}
        with served(make, _application(listening), have=have, model_bytes=size, **how) as drawers:
            app = create_app(subjects, drawing(drawers), limits, keys, _hosts(options), drawers.healthy, _runs(options, subjects), PAGE)
            names = ", ".join(subjects.found())
            port = listening.getsockname()[1]
            host = f"[{options.host}]" if ":" in options.host else options.host
            _say(f"serve: {names}\nserve: http://{host}:{port} is the page, /v1 the API (described at /docs); {fewest} to {most} replicas; Ctrl-C stops it")
            _run(app, listening)


def make_batcher(paths: Sequence[str], base: Subject, rank: int, safety: Path | None) -> "Batcher":
    """What a replica draws with. The base model is the same in every run's folder, and the one that it was found in may be gone by now."""
    import torch

    from raybooth.families.safety import checker
    from raybooth.serving.batcher import Batcher
    from raybooth.serving.engine import Engine

    if not base.weights.is_dir():
        folder = folder_of(base, Subjects([p for p in paths if "://" in p or Path(p).expanduser().exists()]).found())
        if folder is None:
            raise RayboothError(f"The base model {base.weights} has gone, and no run that is left has it.")
        base = replace(base, weights=folder, base_folder=folder)
    unsafe = checker(safety, "cuda" if torch.cuda.is_available() else "cpu") if safety else None
    return Batcher(Engine(base, rank), unsafe)


def slot_rank(subjects: Subjects) -> int:
    """The largest adapters' rank (16 or more), rounded up to a power of two: last bits depend on it, so it should rarely change. Later larger ones go alone."""
    most = max((s.rank for s in subjects.found().values()), default=0)
    return max(16, 1 << (most - 1).bit_length()) if most else 16


def _runs(options: Options, subjects: Subjects) -> "list[APIRouter]":
    """The routes to start runs, if a folder of runs is served: new ones go into the first such folder."""
    from raybooth.serving.runs import RunManager, ServerContext, runs_router

    local = [path_of(p, "PATH") for p in options.paths if "://" not in p]
    folders = [p for p in local if p.is_dir() and not any((p / name).exists() for name in MARKS)]
    base = subjects.base
    served = ServerContext(_section(base), lambda: folder_of(base, subjects.found()), subjects.names)
    return [runs_router(RunManager(folders[0], served, options.set))] if folders else []


def _section(base: Subject) -> dict[str, Any]:
    """The base model as a section of a configuration: as the run that it was found in names it, and not by that run's folder, which may go."""
    if of_base(mini_folder()).base == base.base:
        return {"model": "mini"}  # by its name, which brings its own settings along
    config = base.weights.parent / CONFIG_FILE
    if (read_manifest(base.weights) or {}).get("stage") == "base-model" and config.exists():
        return configuration.load(config).base.model_dump()
    return {"model": str(base.weights.absolute())}


def drawing(drawers: "Served") -> "Draw":
    """The function by which the API has the replicas draw."""
    from raybooth.cluster.serving import LostError
    from raybooth.serving.generations import UnavailableError

    async def draw(job: "Job") -> "AsyncGenerator[Drawn, None]":
        try:
            async with contextlib.aclosing(drawers.draw(job)) as results:
                async for drawn in results:
                    yield drawn
        except LostError as error:
            raise UnavailableError(str(error)) from error

    return draw


def _run(app: "FastAPI", listening: socket.socket) -> None:
    import uvicorn

    how = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, ws="none", limit_concurrency=1000, timeout_graceful_shutdown=5)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(how).run(sockets=[listening])
    _say("serve: stopped")


def _need_the_extra() -> None:
    import importlib.util

    if not all(importlib.util.find_spec(name) for name in ("fastapi", "fastapi_offline", "uvicorn", "prometheus_client", "python_multipart")):
        raise RayboothError("Serving needs packages that are not installed: pip install 'raybooth[serve]'.")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hosts(options: Options) -> frozenset[str] | None:
    """Names under which it may be asked; None: any, where keys are needed, which a page elsewhere that points a name here does not have."""
    from raybooth.serving.guard import LOOPBACK

    if options.api_key_file and not options.allow_host and not _is_loopback(options.host):
        return None
    return LOOPBACK | {name.lower() for name in (options.host, *options.allow_host)}


def _bound(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:  # the system would take only its lowest 16 bits
        raise RayboothError(f"--port {port} is not a port: give a number up to 65535, or 0 for any that is free.")
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, proto)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(where)
        made.listen()  # at once: two may bind to a port while neither listens. Requests wait until the application runs
    except (OSError, UnicodeError) as error:
        raise RayboothError(
            f"--host {host} --port {port} cannot be listened at ({error}): check --host, or choose another --port, or 0 for any that is free."
        ) from None
    return made


def _application(listening: socket.socket) -> str:
    """The name of this server's application on a cluster: no other server has it, and started again this one has the same, whatever it has left behind."""
    host, port, *_ = listening.getsockname()
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"raybooth-{socket.gethostname()}-{host}-{port}")


def _base_folder(name: str | None) -> Path | None:
    if name is None:
        return None
    folder = local_source(name)
    if folder is None or not folder.is_dir():
        raise RayboothError(f"--base {name} is not a model folder on this machine: give a diffusers folder, or mini.")
    return folder


def _safety_folder(base: Subject, wanted: bool) -> Path | None:
    from raybooth.serving.safety import checker_folder

    if not wanted:
        _say("serve: the safety checker is off, as asked for by --safety off")
        return None
    folder = checker_folder(base.weights)
    _say(f"serve: pictures are looked at by the safety checker in {folder}" if folder else "serve: the base model has no safety checker")
    return folder


def _range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,2})(?:-([1-9]\d{0,2}))?", text)
    if not found or int(found[2] or found[1]) < int(found[1]):
        raise RayboothError(f"--replicas {text} is not a number or a range: write it as 2, or as 1-4.")
    return int(found[1]), int(found[2] or found[1])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
