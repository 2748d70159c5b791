"""What Prometheus reads of a server: GET /metrics."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

KNOWN = ("/v1/images/generations", "/v1/models", "/pictures", "/healthz", "/metrics", "/docs", "/api")


class Metrics:
    """One server's counts, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        how: Any = {"registry": self.registry}
        self.requests = Counter("raybooth_requests", "Requests by what was asked for, and the answer's status", ["path", "status"], **how)
        self.seconds = Histogram("raybooth_request_seconds", "From a request's arrival to the end of its answer", ["path"], **how)
        self.pictures = Counter("raybooth_pictures", "Pictures drawn", ["model"], **how)
        self.batch = Histogram("raybooth_batch_pictures", "Pictures that were drawn together", buckets=(1, 2, 4, 8, 16, 32, 64), **how)
        self.waiting = Gauge("raybooth_pictures_waited_for", "Pictures asked for and not yet drawn", **how)
        self.models = Gauge("raybooth_models", "Models that can be drawn", **how)

    def page(self) -> bytes:
        return generate_latest(self.registry)


class Measured:
    """ASGI middleware that counts requests and times them. Unknown paths count as one, so that nobody can fill the memory with names."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.monotonic(), 499  # the client left before there was an answer
        path = next((p for p in KNOWN if scope["path"].startswith(p)), "other")

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception:
            status = 500  # answered further out
            raise
        finally:
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - began)
