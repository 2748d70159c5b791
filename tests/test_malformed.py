"""Whatever else people send to the API: at random, and as its own description allows."""

import contextlib
import json
import os
import random
import socket
import string
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from api_client import ASKED, GENERATIONS, app_with_runs, live, sent
from test_runs import PHOTOS

from raybooth.serving.subjects import Subjects


def nonsense(r: random.Random) -> Any:
    kinds = [
        lambda: None, lambda: r.choice([True, False]), lambda: r.choice([-1, 0, 2**31, 2**63, 10**30, 1e308, -0.0, 0.5]),
        lambda: r.choice(["", "\x00", "../../etc/passwd", "%s%n", "{subject.__class__}", "{0}", "\ud800", "é" * 300, "rex", "64x64", "💥", "a" * 70_000]),
        lambda: [nonsense(r) for _ in range(r.randrange(3))], lambda: {r.choice("ab"): nonsense(r)},
    ]  # fmt: skip
    return r.choice(kinds)()


def malformed(r: random.Random) -> bytes:
    """Something that may arrive at a socket."""
    fields = ["prompt", "model", "n", "size", "seed", "steps", "stream", "partial_images", "response_format", "guidance", "metadata", "user", "nonsense"]
    asked = {**(ASKED if r.random() < 0.8 else {}), **{r.choice(fields): nonsense(r) for _ in range(r.randrange(1, 3))}}
    body = json.dumps(asked, allow_nan=True).encode()
    if r.random() < 0.3:
        body = r.choice([body[: r.randrange(len(body))], r.randbytes(99), b"[" * 5000, b"9" * 5000, b"NaN", b"null", b'"x"', b""])
    name = "".join(r.choice(string.ascii_letters + "éß/\\.%\x01 ?#") for _ in range(r.randrange(1, 40)))
    files = ["../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", "rex%00", "rex/photographs/%2e%2e", name]
    path = r.choice([GENERATIONS] * 8 + [f"{start}{r.choice(files)}" for start in ("/v1/models/", "/pictures/", "/v1/models/rex/photographs/", "/")])
    method = r.choice(["POST"] * 12 + ["GET"] * 4 + ["PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "BREW"])
    length = r.choice([str(len(body))] * 20 + ["-1", "9" * 30, "x"])
    kind = r.choice(["application/json"] * 8 + ["text/plain", "", "application/json; charset=utf-16", "multipart/form-data", "\xff"])
    return sent(method, path, kind, length, body)


def malformed_upload(r: random.Random) -> bytes:
    """The same for runs."""
    called = ["", *(f'; filename="{f}"' for f in ("a.png", "../../../etc/cron.d/x", "\x00", "a" * 300))]
    values = [b"rex", b"fido", b"dog", b"../x", b"\xff\xfe", b"\x00", b"+2AA-", b"\\ud800", b"", b"a" * 5000, r.randbytes(50), PHOTOS[0]]
    names = [r.choice(["photos", "name", "class", "token", "nonsense", "", "é\xff"]) for _ in range(r.randrange(5))]
    rows = names if r.random() < 0.5 else ["photos", "name", "class"]
    parts = [f'--b\r\nContent-Disposition: form-data; name="{n}"{r.choice(called)}\r\n\r\n'.encode() + r.choice(values) + b"\r\n" for n in rows]
    body = b"".join(parts) + r.choice([b"--b--\r\n"] * 6 + [b"", b"--b", b"--c--\r\n"])
    if r.random() < 0.2:
        body = r.choice([body[: r.randrange(len(body) + 1)], r.randbytes(99), b"", b"--b\r\n" * 300, b"--b\r\nContent-Disposition: " + b"x" * 9000])
    encodings = ["punycode", "idna", "utf-7", "unicode_escape", "utf-16", "zlib", "nonsense", '"a\\0b"', "utf-8"]
    kind = r.choice(["multipart/form-data; boundary=b"] * 8 + ["multipart/form-data", "multipart/form-data; boundary=", "application/json", "\xff"])
    kind += r.choice([""] * 8 + [f"; charset={e}" for e in encodings])
    files = ["rex/pictures/..%2fconfig.json", "rex/pictures/photographs/00.png", "%2e%2e", "rex%00"]
    run = r.choice(["rex", "fido", "..", "", "rex/resume", "none/resume", *files])
    method, path = r.choice([("POST", "/api/runs")] * 5 + [(m, f"/api/runs/{run}") for m in ("GET", "POST", "DELETE", "PUT")])
    return sent(method, path, kind, str(len(body)), body)


def answered(url: str, request: bytes) -> tuple[int, bytes]:
    """Status and all that was answered."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as sent:
        with contextlib.suppress(ConnectionError):  # it need not read to the end what it refuses
            sent.sendall(request)
        said = b""
        with contextlib.suppress(ConnectionError):
            while more := sent.recv(1 << 16):
                said += more
    return (int(said.split(b" ", 2)[1]) if said else 0), said


def test_malformed_requests_are_the_senders_mistake(subjects: Subjects, kennel: Path):
    """Five hundred at a socket, and three hundred uploads: no answer of 500 or above, errors in their shape, no file opened outside of the storage."""
    opened: list[str] = []
    watching = True

    def hook(name: str, args: tuple[Any, ...]) -> None:
        if watching and name == "open" and isinstance(args[0], str | bytes):
            opened.append(os.fsdecode(args[0]))

    r, seen = random.Random(0), Counter[int]()
    with live(app_with_runs(subjects, kennel)) as url:
        answered(url, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")  # which imports
        sys.addaudithook(hook)
        for i in range(800):
            request = malformed(r) if i < 500 else malformed_upload(r)
            status, said = answered(url, request)
            seen[status] += 1
            assert status < 500, (i, request[:300], said)
            head, _, body = said.partition(b"\r\n\r\n")
            if status >= 400 and b"application/json" in head and not request.startswith(b"HEAD"):
                assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}, (request[:300], said)
            elif status >= 400 and not request.startswith(b"HEAD"):
                assert b"Invalid HTTP request received" in said, (request[:300], said)  # not even HTTP
        watching = False
        assert answered(url, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")[0] == 200
    assert seen[400] > 100
    assert seen[404] > 30
    assert seen[200] > 2
    assert seen[0] < 25, "given up without an answer: those whose body never came"
    storage = next(iter(subjects._paths))
    allowed = (str(storage), str(kennel), "/proc/self", "/dev/null", sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]))
    assert not [f for f in opened if not f.startswith(allowed)]


def test_it_does_what_its_description_says(subjects: Subjects, kennel: Path):
    """Schemathesis: requests as described and others, and whether the answers are those that are described."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    schema = schemathesis.openapi.from_asgi("/openapi.json", app_with_runs(subjects, kennel))
    tried = set()
    for found in schema.get_all_operations():
        operation: Any = found
        for mode in GenerationMode:

            @settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.ok().as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                if case.path == GENERATIONS and isinstance(case.body, dict) and case.body.get("n") != 1:  # half of them ask for what is there
                    case.body |= {"model": "rex", "size": "auto"}
                if len(str(case.path_parameters.get("run", ""))) % 2:
                    case.path_parameters["run"] = "rex"
                tried.add((case.path, case.call_and_validate(checks=checks).status_code))

            try:
                check()
            except Exception as error:
                if "Unsatisfiable" not in type(error).__name__:  # there is nothing wrong to be said where nothing is asked
                    raise
    assert {(GENERATIONS, 200), (GENERATIONS, 400), ("/v1/models", 200), ("/v1/models/{model}", 404), ("/healthz", 200)} <= tried
    assert {("/api/runs", 200), ("/api/runs", 400), ("/api/runs/{run}", 200), ("/api/runs/{run}", 404), ("/api/runs/{run}/resume", 409)} <= tried
