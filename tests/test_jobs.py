"""What goes wrong in the workers that draw, encode and score, in a sentence."""

import contextlib
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import WorkerGroupError
from ray.util import placement_group, placement_group_table
from stored import make_run

from raybooth.cluster.fit import LESS_MEMORY, _loss, place_given_back, run_group
from raybooth.cluster.rows import _held, _made, map_rows
from raybooth.cluster.session import Resources, check_workers
from raybooth.config import Config
from raybooth.drawing import map_into
from raybooth.errors import RayboothError
from raybooth.families import Loaded
from raybooth.jobs import drawing_digest, encoder, featurizer, for_inference, sampler
from raybooth.pictures import png
from raybooth.sections import Sampling
from raybooth.session import Run
from raybooth.stage import Stage
from raybooth.workspace import Workspace

MAKERS: dict[str, tuple[Callable[..., Any], str, str, list[str]]] = {
    "drawing": (partial(sampler, model_stage="base-model", sampling=Sampling(2, 1.0, "ddim", 32), batch=1), "opened",
                "raybooth.sample.Sampler.draw", ["cluster.sample_batch", "cluster.samplers", "base.resolution"]),
    "encoding": (partial(encoder, prompts=True, model=""), "for_inference", "raybooth.families.parts.encode_image", ["cluster.samplers", "base.resolution"]),
    "scoring": (partial(featurizer, model=""), "stage_folder", "", ["cluster.samplers", "evaluate.dino", "evaluate.clip"]),
}  # fmt: skip


def no_room(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> str:
    return str(make_run(tmp_path_factory.mktemp("jobs") / "run", toy, 0))


@pytest.mark.parametrize("what", MAKERS)
def test_out_of_memory_names_what_needs_less(storage: str, what: str, monkeypatch: pytest.MonkeyPatch):
    """Where the model is loaded, of which no setting of the work makes less, and where it works. Those that score are settings themselves."""
    make, loads, works, named = MAKERS[what]
    if what == "drawing":
        make = partial(make, model=drawing_digest(Workspace(storage), "base-model"))
    with monkeypatch.context() as patch:
        patch.setattr(f"raybooth.jobs.{loads}", no_room)
        with pytest.raises(RayboothError) as said:
            make(storage)
    assert str(said.value).lower().startswith(f"{what}, at the loading of the model, ran out of memory")
    places = [str(said.value).index(name) for name in (named if what == "scoring" else ["cluster.samplers", "a smaller model"])]
    assert places == sorted(places)
    assert "sample_batch" not in str(said.value)
    if works:
        monkeypatch.setattr(works, no_room)
        work = make(storage)
        with pytest.raises(RayboothError, match=f"(?i)^{what} ran out of memory.*{'.*'.join(named)}"):
            work([{"name": "a", "prompt": "a dog", "seed": 1} if what == "drawing" else {"name": "a", "picture": png(Image.new("RGB", (32, 32)))}])


def test_a_sentence_from_a_worker_arrives_as_itself(storage: str, ray: None, capfd: pytest.CaptureFixture[str]):
    make = partial(encoder, f"{storage}/fine-tuned-model", prompts=False, model="")
    with pytest.raises(RayboothError) as said:
        list(map_rows(make, [{"name": "a"}], batch=1, have=Resources(1, 0, 1), retries=0, say=print))
    assert str(said.value).startswith("There is no model folder")
    assert "\n" not in str(said.value)
    assert "ERROR" not in capfd.readouterr().err


def test_pictures_that_kill_their_worker_are_not_tried_for_ever(ray: None, tmp_path: Path):
    """Ray Data itself would begin again and again, and say nothing."""
    dies = f"import os, signal\nwith open({str(tmp_path / 'deaths')!r}, 'a') as file: file.write('x')\nos.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(RayboothError, match="The same pictures lost a worker 2 times, perhaps for lack of memory"):
        list(map_rows(partial(exec, dies), [{"name": "a"}], batch=1, have=Resources(1, 0, 1), retries=1, say=print))  # type: ignore[arg-type]
    assert (tmp_path / "deaths").read_text() == "xx"


def test_ctrl_c_while_a_file_is_written_ends_the_drawing(storage: str, ray: None):
    """Ray Data's threads would go on until nobody holds the error any more: after Ray has gone, which they tell at length."""

    def interrupted(name: str, data: bytes) -> None:
        assert drawing()
        raise KeyboardInterrupt

    def drawing() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith(("StreamingExecutor", "ray-data", "iter_threaded", "Prefetcher"))]

    slow = partial(eval, "lambda rows: __import__('time').sleep(0.1) or [b''] * len(rows)")
    rows = [{"name": str(i)} for i in range(400)]
    run = Run(Config(subject={"photos": [], "class": "dog"}, storage=storage))
    with run, pytest.raises(KeyboardInterrupt) as held:
        map_into(cast(Stage, SimpleNamespace(write=interrupted)), run, slow, rows, batch=1, title="", unit="", model_stage="base-model")
    assert held.tb
    assert not drawing()


def test_a_killed_worker_of_a_fine_tuning_names_what_needs_less_memory(ray: None):
    """By the system, which says nothing of why; Ray's own memory monitor says it by an error of its own."""

    def killed(group: Any, say: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RayboothError, match=r"lost a worker 1 time, .* What needs less memory, in this order: ") as said:
        run_group(lambda: killed, workers=(1, 1), gpus_per_worker=0, retries=0, have=Resources(1, 0, 1), heard=print)
    assert str(said.value).endswith(LESS_MEMORY)
    assert "Of the last Ray says: " in str(said.value)
    assert _loss(OutOfMemoryError("Task was killed due to the node running low on memory."))


def said_with_a_ray_of_its_own(body: str) -> list[str]:
    """What `body` prints, whose CPUs nothing else holds. It has `fit`, `session`, and `have` of the Ray."""
    start = "import raybooth.cluster.fit as fit\nfrom raybooth.cluster import session\n\nwith session.connected(None) as have:\n"
    done = subprocess.run([sys.executable, "-c", start + textwrap.indent(body, "    ")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_group_that_has_no_place_yet_says_so_and_starts_when_it_has():
    """Others use the cluster: Ray waits for as long as they do, and says nothing."""
    said = said_with_a_ray_of_its_own("""
from ray.util.placement_group import placement_group, remove_placement_group

session.PATIENCE = 0.5
taken = placement_group([{"CPU": have.cpus}])
assert taken.wait(60)

def heard(word):
    print(word["note"])
    remove_placement_group(taken)

loop = lambda group, say: group.world
print(fit.run_group(lambda: loop, workers=(1, 1), gpus_per_worker=0, retries=0, have=have, heard=heard))
""")
    (told, ended) = said
    assert re.fullmatch(r"Ray has no place for 1 worker \(1 CPU each\) yet: the cluster has (\d+) CPUs \(0 free\); they start when there is one", told)
    assert ended == "1"


def test_rows_that_have_no_place_yet_say_so_and_begin_when_they_have():
    """Once, and not of rows whose worker takes its time."""
    said = said_with_a_ray_of_its_own("""
from functools import partial
from raybooth.cluster.rows import map_rows
from ray.util.placement_group import placement_group, remove_placement_group

slow = partial(eval, "lambda rows: __import__('time').sleep(2.5) or [r['name'].encode() for r in rows]")
list(map_rows(slow, [{"name": "a process"}], batch=1, have=have, retries=0, say=print))
session.PATIENCE = 1
print(list(map_rows(slow, [{"name": "a"}], batch=1, have=have, retries=0, say=print)))
taken = placement_group([{"CPU": have.cpus}])
assert taken.wait(60)

def say(text):
    print(text)
    remove_placement_group(taken)

print(list(map_rows(slow, [{"name": "b"}], batch=1, have=have, retries=0, say=say)))
""")
    (first, told, then) = said
    assert first == "[('a', b'a')]"
    assert re.match(r"Ray has no place for workers .* yet: the cluster has (\d+) CPUs \(0 free\); they start when there is one$", told)
    assert then == "[('b', b'b')]"


def test_an_elastic_group_takes_what_others_leave():
    """Ray's own counts what there is, and waits for ever for the rest."""
    said = said_with_a_ray_of_its_own("""
import ray

@ray.remote(num_cpus=have.cpus - 1)
class Other:
    def here(self):
        return True

other = Other.remote()
ray.get(other.here.remote())
loop = lambda group, say: group.world
print(fit.run_group(lambda: loop, workers=(1, have.cpus), gpus_per_worker=0, retries=0, have=have, heard=print))
""")
    assert said == ["1"]


@pytest.mark.parametrize(
    ("workers", "each", "machines", "fits"),
    [
        (2, 1.0, ((4, 1), (4, 1)), True), (1, 2.0, ((4, 1), (4, 1)), False), (2, 1.0, ((1, 2),), False), (1, 2.0, ((1, 2),), True),
        (4, 0.5, ((4, 2),), True), (3, 0.5, ((2, 2),), False),
    ],
)  # fmt: skip
def test_workers_that_no_machine_has_room_for_are_refused(workers: int, each: float, machines: tuple[tuple[int, int], ...], fits: bool):
    """Ray would wait for such a place for ever."""
    have = Resources(sum(c for c, _ in machines), sum(g for _, g in machines), len(machines), machines=machines)
    with contextlib.nullcontext() if fits else pytest.raises(RayboothError, match=r"on one machine for each, .* ask for fewer"):
        assert check_workers(workers, each, have) == each


def test_ray_stays_until_ray_data_has_ended():
    """It is left in the middle, as by Ctrl-C, while its loop is in a long step."""
    said = said_with_a_ray_of_its_own("""
import time

import ray.data
from ray.data._internal.execution.streaming_executor import StreamingExecutor

step, left = StreamingExecutor._scheduling_loop_step, []

def long_step(self, topology):
    goes_on = step(self, topology)
    if left:
        time.sleep(3)
        print(ray.is_initialized())
    return goes_on

StreamingExecutor._scheduling_loop_step = long_step
rows = iter(ray.data.range(1000, override_num_blocks=100).iter_rows())
next(rows)
left.append(True)
time.sleep(0.5)
del rows
""")
    assert set(said) == {"True"}


NOTEBOOK = "import asyncio\nasyncio._set_running_loop(asyncio.new_event_loop())\n"
"""Cells run in an event loop."""


@pytest.mark.parametrize("where", ["", NOTEBOOK], ids=["a script", "a notebook"])
def test_a_group_that_is_interrupted_stops_and_gives_its_place_back_though_ray_stays(tmp_path: Path, where: str):
    """As after raybooth.connect(). The second worker waits for the first, as in a step."""
    said = said_with_a_ray_of_its_own(f"""
{where}
import contextlib, os, signal, time
from pathlib import Path

import ray

beats = Path({str(tmp_path / "beats")!r})

def goes_on(group, say):
    while True:
        group.least(group.rank)
        with beats.open("a") as file:
            file.write("x")
        say({{"step": 1}})
        time.sleep(0.1)

def interrupt(word):
    if beats.stat().st_size > 5 and not said:
        said.append(word)
        os.kill(os.getpid(), signal.SIGINT)

def group(loop):
    return fit.run_group(lambda: loop, workers=(2, 2), gpus_per_worker=0, retries=2, have=have, heard=interrupt)

said = []
with contextlib.suppress(KeyboardInterrupt):
    group(goes_on)
    print("it was not interrupted")
end = time.monotonic() + 60
while ray.available_resources().get("CPU", 0) < have.cpus and time.monotonic() < end:
    time.sleep(0.1)
print("free:", ray.available_resources().get("CPU", 0) == have.cpus)
print(group(lambda group, say: group.world))
size = beats.stat().st_size
time.sleep(1)
print("still:", beats.stat().st_size == size)
""")
    assert said == ["free: True", "2", "still: True"]


def test_a_worker_that_dies_as_it_starts_is_a_lost_one():
    """Ray itself begins such a group anew without end, and leaves its place taken."""
    said = said_with_a_ray_of_its_own("""
import time

import ray

from raybooth.errors import RayboothError

class Deadly:
    def __reduce__(self):
        return exec, ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)",)

try:
    fit.run_group(Deadly(), workers=(1, 1), gpus_per_worker=0, retries=1, have=have, heard=lambda word: print(word["note"]))
except RayboothError as error:
    print(str(error)[:34])
end = time.monotonic() + 20
while ray.available_resources().get("CPU", 0) < have.cpus and time.monotonic() < end:
    time.sleep(0.1)
print("free:", ray.available_resources().get("CPU", 0) == have.cpus)
""")
    ours = [line for line in said if "(raylet)" not in line]
    assert ours == ["a worker was lost, the group starts again", "Fine-tuning lost a worker 2 times,", "free: True"]


def test_a_group_that_fails_leaves_no_place_taken(ray: None):
    """Ray Train leaves one when a worker dies before it has begun."""
    places: list[Any] = []

    def fails() -> None:
        with place_given_back():
            places.append(placement_group([{"CPU": 0.01}]))
            assert places[0].wait(60)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    end = time.monotonic() + 20
    while (state := placement_group_table(places[0])["state"]) != "REMOVED" and time.monotonic() < end:
        time.sleep(0.1)
    assert state == "REMOVED"


def test_a_storage_that_the_machines_do_not_share_is_a_sentence(storage: str):
    """There is another model at its path, or none."""
    with pytest.raises(RayboothError, match="is not the one of this run: on a cluster it must be a mount that all machines have"):
        sampler(storage, "base-model", Sampling(2, 1.0, "ddim", 32), 1, "another")
    with pytest.raises(RayboothError, match="is not the one of this run"):
        sampler(f"{storage}/elsewhere", "base-model", Sampling(2, 1.0, "ddim", 32), 1, "another")


CLOSED = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:2301")


@pytest.mark.parametrize(
    ("failures", "is_lost"),
    [
        ([CLOSED, CLOSED], True), ([CLOSED, RuntimeError("NCCL error in: ncclUtils.hpp:275")], True), ([CLOSED, ActorDiedError()], True),
        ([ValueError("a mistake"), CLOSED], False), ([FileNotFoundError("/data/igloo/latents/a.safetensors")], False),
    ],
    ids=["connections", "connections on GPUs", "one that died", "a mistake that closes the others' connections", "a mistake in a folder"],
)  # fmt: skip
def test_a_mistake_is_no_lost_worker(failures: list[Exception], is_lost: bool):
    """What is lost is started again, three times."""
    assert (_loss(WorkerGroupError("It failed.", dict(enumerate(failures)))) is not None) == is_lost


def test_a_process_forgets_its_model_before_it_loads_another(storage: str, monkeypatch: pytest.MonkeyPatch):
    """By reference counts alone: the collector of cycles seldom comes."""
    models: list[weakref.ref[torch.nn.Module]] = []

    def noted(*given: Any) -> Loaded:
        assert not any(model() for model in models)
        loaded = for_inference(*given)
        models.extend(weakref.ref(module) for module in loaded.modules.values())
        return loaded

    monkeypatch.setattr("raybooth.jobs.for_inference", noted)
    draws, encodes = partial(MAKERS["drawing"][0], model=drawing_digest(Workspace(storage), "base-model")), MAKERS["encoding"][0]
    gc.disable()
    try:
        for make in (draws, encodes, draws):
            work = pickle.dumps(partial(make, storage))
            _made(work, 1)([{"name": "a", "prompt": "a dog", "seed": 1}])
            assert _made(work, 1) is _made(work, 1)
    finally:
        gc.enable()
        _held.clear()
    assert len(models) == 3 + 2 + 3
