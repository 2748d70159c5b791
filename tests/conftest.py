"""A Stable Diffusion of toy size, and photographs of it: enough to drive every line without waiting."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "0")
os.environ.setdefault("RAY_worker_niceness", "0")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for each half; workers of runs have their own number
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait take the cores from the other half of the tests
os.environ["HF_ENDPOINT"] = os.environ.get("RAYBOOTH_TEST_ENDPOINT", "http://127.0.0.1:9")  # no test reaches the real hub
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="raybooth-tests-")  # mirrors of remote storages; before Ray starts, for its workers to have it too

import pytest
from toys import make_sd

from raybooth.mini.world import render, subject_scenes

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from raybooth.serving.subjects import Subjects

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C, and so would what the tests start


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """Started once for all tests that run stages in their own process: stages join the Ray that is there."""
    from raybooth.cluster.session import connected

    with connected(None):
        yield


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are worked on in this process: no Ray."""
    from raybooth.session import Run

    def map_rows(make: Callable[[], Callable[[list[Any]], list[bytes]]], rows: list[dict[str, Any]], **_: Any) -> Iterator[tuple[str, bytes]]:
        yield from zip([r["name"] for r in rows], make()(rows), strict=True)

    monkeypatch.setattr("raybooth.drawing.map_rows", map_rows)
    monkeypatch.setattr(Run, "ray", None)


@pytest.fixture(scope="module")
def fits_here() -> Iterator[None]:
    """A group of one worker is this process: its loop is pickled as for another, and none is started."""
    from ray import cloudpickle
    from stored import alone

    def run_group(make: Callable[[], Any], *, heard: Callable[[dict[str, Any]], None], **_: Any) -> Any:
        return cloudpickle.loads(cloudpickle.dumps(make))()(alone(), heard)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raybooth.cluster.fit.run_group", run_group)
        yield


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, scene in enumerate(subject_scenes(1, "dog", 3)):
        render(scene).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, toy: Path, photos: Path, ray: None) -> Path:
    """A fine-tuning that nothing has interrupted, the reference of those that something has."""
    from filelock import FileLock
    from test_pipeline import LONGER, call

    shared = tmp_path_factory.getbasetemp()
    storage = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "unbroken"  # once for both halves of the tests
    with FileLock(f"{storage}.lock"):
        if not (storage / "output-images" / "manifest.json").exists():
            call("run", storage, toy, photos, **LONGER)
    return storage


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> "Subjects":
    """rex and lassie, adapters of the toy."""
    from stored import make_run

    from raybooth.serving.subjects import Subjects

    folder = tmp_path_factory.mktemp("kennel")
    make_run(folder / "rex", toy, 1)
    make_run(folder / "lassie", toy, 2)
    return Subjects([str(folder)])


@pytest.fixture
def client(tmp_path: Path) -> Iterator["TestClient"]:
    """Of a server that runs what is uploaded."""
    from test_runs import serve

    with serve(tmp_path) as made:
        yield made


@pytest.fixture
def kennel(tmp_path: Path) -> Path:
    """rex, learnt before by the API of runs."""
    import stand_in
    from test_runs import MINI, PHOTOS, SETTINGS

    from raybooth.serving import uploads

    storage = tmp_path / "rex"
    uploads.store(storage, uploads.settings(storage, MINI.base, {"class": "dog"}, SETTINGS), [uploads.Photo("a.png", PHOTOS[0])])
    stand_in.run(storage)
    return tmp_path
