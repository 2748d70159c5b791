"""Ray as raybooth starts it."""

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("ray")


def test_workers_allocate_by_jemalloc_and_nothing_else_does():
    import ray

    @ray.remote(num_cpus=0.5)
    def mapped() -> str:
        return Path("/proc/self/maps").read_text()

    assert "libjemalloc" in ray.get(mapped.remote())
    assert "LD_PRELOAD" not in os.environ
