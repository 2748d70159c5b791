"""What `raybooth doctor` says of a machine."""

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from raybooth import doctor
from raybooth.cluster.session import Resources


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def connected(address: str | None) -> Iterator[Resources]:
        yield Resources(cpus=3, gpus=0, nodes=1)

    monkeypatch.setattr("raybooth.cluster.session.connected", connected)


def with_gpu(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name="Small", total_memory=int(gib * 2**30)))


def test_it_tells_of_everything_that_a_run_needs():
    lines = doctor.report().splitlines()
    facts = {line[:13].strip(): line[13:] for line in lines[: lines.index("")]}
    assert list(facts) == ["python", "versions", "processors", "memory", "disk", "graphics", "ray", "hub", "mini"]
    assert all(facts.values())
    assert f"torch {torch.__version__}" in facts["versions"]
    assert facts["ray"] == "starts here, with 3 CPUs and 0 GPUs"
    assert "cannot be reached" in facts["hub"]


@pytest.mark.parametrize(
    ("gib", "told"), [(16, "finetune.method = lora with finetune.lr = 1e-4 needs about 7 GiB"), (24, "SD 1.4 with its text encoder fits.")]
)
def test_a_small_gpu_is_told_what_fits(monkeypatch: pytest.MonkeyPatch, gib: int, told: str):
    with_gpu(monkeypatch, gib)
    *lines, expectation = doctor.report().splitlines()
    assert told in expectation
    assert f"graphics     Small with {gib} GiB" in lines


@pytest.mark.parametrize(
    ("can", "told"),
    [({"avx512_bf16": True, "amx_bf16": True}, r"\d+, with AVX512-BF16 and AMX-BF16: steps are computed in bfloat16"), ({"avx512_bf16": False}, r"\d+")],
)
def test_it_tells_of_a_processor_with_bfloat16(monkeypatch: pytest.MonkeyPatch, can: dict[str, bool], told: str):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    (line,) = [line for line in doctor.report().splitlines() if line.startswith("processors")]
    assert re.fullmatch(told, line[13:])


def no_http() -> str:
    """An endpoint that answers by another protocol."""
    listens = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with listens, listens.accept()[0] as asked:
            asked.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

    threading.Thread(target=answer, daemon=True).start()
    return f"http://127.0.0.1:{listens.getsockname()[1]}"


@pytest.mark.parametrize(("endpoint", "told"), [(lambda: "hf-mirror.com", "unknown url type"), (no_http, "SSH-2.0"), (lambda: "http://[::1", "Invalid")])
def test_an_endpoint_that_is_none_is_not_reached(monkeypatch: pytest.MonkeyPatch, endpoint: Callable[[], str], told: str):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint())
    (line,) = [line for line in doctor.report().splitlines() if line.startswith("hub")]
    assert "cannot be reached" in line
    assert told in line
