"""`python -m benchmarks.serving [SECONDS]`: 64 clients and 8 subjects against `raybooth serve`, and plain diffusers drawing one at a time, in one run.

Every picture is compared with the same one drawn alone. Then a replica is killed under the same load.
"""

import asyncio
import contextlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil

from raybooth.families.lora import WEIGHTS
from raybooth.mini import FOLDER
from tests.stored import make_adapters

CLIENTS, SUBJECTS, STEPS, GUIDANCE = 64, 8, 20, 3.0
PROMPTS = [f"photo of a dog {place}" for place in ("in the snow", "on the beach", "at night")]


def one_at_a_time(folder: Path, seconds: float) -> float:
    """Pictures a second of diffusers' own pipeline, with all adapters loaded and the one that is wanted switched on for each call."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe: Any = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="dpmsolver++", solver_order=2)
    names = [f.stem for f in sorted(folder.glob("*.safetensors"))]
    for name in names:
        pipe.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)
    drawn, began = 0, 0.0
    while not drawn or time.monotonic() < began + seconds:
        pipe.set_adapters(names[drawn % len(names)])
        pipe(PROMPTS[drawn % len(PROMPTS)], num_inference_steps=STEPS, guidance_scale=GUIDANCE)
        began = began or time.monotonic()  # the first one warms up
        drawn += 1
    return (drawn - 1) / (time.monotonic() - began)


def in_own_process(folder: Path, seconds: float) -> float:
    done = subprocess.run([sys.executable, "-m", "benchmarks.serving", "--peer", str(folder), str(seconds)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    command = [sys.executable, "-m", "raybooth", "serve", str(folder), "--base", "mini", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"http://[\d.]+:\d+", said)):
            said = next(process.stderr)
        try:
            yield found[0], psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            process.stderr.read()


def replicas(process: psutil.Process) -> list[psutil.Process]:
    return [p for p in process.children(recursive=True) if "ServeReplica" in _title(p)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


@dataclass
class Load:
    """What the clients have seen."""

    http: httpx.AsyncClient
    alone: dict[tuple[str, str], str] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    different: int = 0
    finished: list[float] = field(default_factory=list)

    async def draw(self, subject: str, prompt: str) -> tuple[int, str, float]:
        """Status (0: the connection broke), picture, seconds to wait before the next."""
        asked = {"model": subject, "prompt": prompt, "seed": 7, "steps": STEPS, "guidance": GUIDANCE}
        try:
            answer = await self.http.post("/v1/images/generations", json=asked)
        except httpx.TransportError as error:
            print(f"a connection broke: {error!r}", flush=True)
            return 0, "", 1
        if answer.status_code != 200:
            return answer.status_code, "", float(answer.headers.get("retry-after", 1))
        return 200, answer.json()["data"][0]["b64_json"], 0

    async def client(self, number: int, until: float) -> None:
        r = random.Random(number)
        while time.monotonic() < until:
            key = r.choice(list(self.alone))
            status, picture, wait = await self.draw(*key)
            self.statuses[status] += 1
            if status == 200:
                self.different += picture != self.alone[key]
                self.finished.append(time.monotonic())
            await asyncio.sleep(wait)


async def under_load(url: str, process: psutil.Process, seconds: float) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=200, limits=httpx.Limits(max_connections=CLIENTS + 1)) as http:
        alone = {}
        began = time.monotonic()
        for key in [(f"subject-{i}", prompt) for i in range(SUBJECTS) for prompt in PROMPTS]:
            alone[key] = (await Load(http).draw(*key))[1]
        print(f"\nalone, one at a time: {len(alone) / (time.monotonic() - began):.2f} pictures/s, {len(set(alone.values()))} different ones", flush=True)
        warm = Load(http, alone)
        await asyncio.gather(*(warm.client(i, time.monotonic() + 30) for i in range(CLIENTS)))
        before = {p.pid: memory(p) for p in replicas(process)}
        load, began = Load(http, alone), time.monotonic()
        await asyncio.gather(*(load.client(i, began + seconds) for i in range(CLIENTS)))
        took = time.monotonic() - began
        print(f"{CLIENTS} clients, {took:.0f} s: {len(load.finished) / took:.2f} pictures/s; answers {dict(load.statuses)}; {load.different} other than alone")
        for pid, start in before.items():
            print(f"replica {pid}: {start >> 20} MB resident after 30 s of load, {memory(psutil.Process(pid)) >> 20} MB at the end")
        print(f"server: {memory(process) >> 20} MB")
        await killed(Load(http, alone), process)


async def killed(load: Load, process: psutil.Process) -> None:
    """Kill one replica in the middle of a load of two minutes; print when there were as many as before, and the longest time without a picture."""
    there = {p.pid for p in replicas(process)}
    until = time.monotonic() + 120
    clients = [asyncio.create_task(load.client(i, until)) for i in range(CLIENTS)]
    await asyncio.sleep(10)
    at, victim = time.monotonic(), min(there)
    psutil.Process(victim).kill()
    while len(now := [p for p in replicas(process) if p.pid != victim]) < len(there) and time.monotonic() < until:
        await asyncio.sleep(0.1)
    put_up = time.monotonic() - at
    await asyncio.gather(*clients)
    times = [at, *(t for t in load.finished if t > at)]
    gap = max(b - a for a, b in itertools.pairwise(times))
    print(
        f"one of {len(there)} replicas killed: {len(now)} {put_up:.1f} s later, longest time without a picture {gap:.1f} s, "
        f"answers {dict(load.statuses)}, {load.different} other than alone"
    )


def memory(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def main(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "subjects"
        folder.mkdir()
        for i in range(SUBJECTS):
            make_adapters(FOLDER, Path(scratch) / "one", i, scale=0.03, rank=16, alpha=16.0)
            (Path(scratch) / "one" / WEIGHTS).rename(folder / f"subject-{i}.safetensors")
        print(f"load of the machine before: {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
        rates = [in_own_process(folder, seconds / 4)]
        with server(folder) as (url, process):
            asyncio.run(under_load(url, process, seconds))
        rates.append(in_own_process(folder, seconds / 4))
        print(f"plain diffusers, one at a time: {rates[0]:.2f} pictures/s before, {rates[1]:.2f} after; load of the machine {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        print(one_at_a_time(Path(sys.argv[2]), float(sys.argv[3])))
    else:
        main(float(sys.argv[1]) if sys.argv[1:] else 120)
