"""The checks on every request before anything is parsed: its host, its origin, its key, its size, its speed."""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raybooth.errors import RayboothError
from raybooth.serving.errors import ApiError
from raybooth.serving.schemas import Limits

LOOPBACK = frozenset({"localhost"})
"""What this machine calls itself."""


def read_keys(file: Path) -> list[str]:
    """The keys in a file, one a line; empty lines and those that begin with # do not count.

    Raises:
        RayboothError: if it cannot be read, or holds no key, or one that nobody can send.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RayboothError(f"The file of API keys {file} cannot be read ({error}): give a text file with one key a line.") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise RayboothError(f"The file of API keys {file} holds no key: write one a line, such as what 'openssl rand -hex 32' prints.")
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise RayboothError(f"The file of API keys {file} holds a key that no header can carry: use letters without accents, digits and signs.")
    return keys


class Keys:
    """The keys that are good. A given one is compared with all of them, by hash, in constant time."""

    def __init__(self, keys: Sequence[str]):
        self.hashes = [hashlib.sha256(k.encode()).digest() for k in keys]

    def admit(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        own = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        good = sum(hmac.compare_digest(own, h) for h in self.hashes)  # all of them: no early exit
        return good > 0 and scheme.lower() == "bearer"


class Guard:
    """ASGI middleware that refuses requests.

    Args:
        keys: those that open /v1, /api and /metrics; if there are none, these are open.
        hosts: names under which the server may be asked, besides addresses: against pages elsewhere that point a name at this machine; None: any.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], hosts: frozenset[str] | None, limits: Limits):
        self.app, self.keys, self.hosts, self.limits = app, Keys(keys) if keys else None, hosts, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        most = self.limits.body if scope["path"].startswith("/v1/") else self.limits.upload
        problem = self._problem(scope, Headers(scope=scope), most)
        if problem:
            return await problem.send(scope, receive, send)
        if scope["method"] == "HEAD":  # an answer's body is left out by the server below
            scope = {**scope, "method": "GET"}
        with contextlib.suppress(_StalledError):
            await self.app(scope, self._measured(receive, most), self._patient(send))

    def _patient(self, send: Send) -> Send:
        """`send`, but not for ever: a client that does not read what it asked for must not hold its place."""

        async def patient(message: Message) -> None:
            try:
                async with asyncio.timeout(self.limits.seconds):
                    await send(message)
            except TimeoutError:
                raise _StalledError from None

        return patient

    def _problem(self, scope: Scope, headers: Headers, most: int) -> ApiError | None:
        path = scope["path"]
        host = _name(headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts and not _is_address(host):
            names = ", ".join(sorted(self.hosts))
            return ApiError(400, f"This server answers to its address and to {names} only: start it with --allow-host for another name.", "wrong_host")
        origin = headers.get("origin")
        if origin and scope["method"] not in ("GET", "HEAD") and origin.partition("://")[2] != headers.get("host", ""):
            return ApiError(403, "Pages of other origins may not ask this server for anything.", "wrong_origin")
        if self.keys and path.startswith(("/v1", "/api", "/metrics")) and not self.keys.admit(headers.get("authorization", "")):
            return ApiError(401, "A key is needed: send it as 'Authorization: Bearer KEY'.", "invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdecimal() and len(length) < 20 and int(length) > most:
            return _too_large(most)
        if path.startswith("/v1") and scope["method"] == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return ApiError(400, "The body must be JSON: send it with 'Content-Type: application/json'.", "invalid_content_type")
        return None

    def _measured(self, receive: Receive, most: int) -> Receive:
        """`receive`, with no more than `most` bytes of a body, and not for ever."""
        loop = asyncio.get_running_loop()
        taken, complete, until = 0, False, loop.time() + self.limits.seconds

        async def measured() -> Message:
            nonlocal taken, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "The body did not arrive in time.") from None
            taken += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if taken > most:
                problem = _too_large(most)
                raise HTTPException(problem.status, problem.error.message)
            return message

        return measured


class _StalledError(Exception):
    pass


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The body is larger than the {most} bytes that are allowed.", "request_too_large")


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _name(host: str) -> str:
    """A Host header's name without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].lower()
