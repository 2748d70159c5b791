"""What jemalloc does with what is freed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raybooth.cluster.allocator import environment

CYCLES, PAGES = 50, (8 << 20) // 4096
FAULTS = f"""
import resource
from raybooth.cluster.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({CYCLES}):
        bytearray({PAGES * 4096})
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_freed_memory()
faults()
print(given_back, faults())
"""


def faults(values: dict[str, str]) -> list[int]:
    done = subprocess.run([sys.executable, "-c", FAULTS], env={**os.environ, **values}, check=True, capture_output=True, text=True)
    return [int(n) for n in done.stdout.split()]


@pytest.mark.skipif(not environment(), reason="this Ray comes without jemalloc")
def test_a_worker_keeps_what_its_steps_free():
    at_once = environment() | {"MALLOC_CONF": "oversize_threshold:0,background_thread:true,dirty_decay_ms:0,muzzy_decay_ms:0"}
    given_back, kept = faults(at_once)
    assert given_back > CYCLES * PAGES * 0.9
    assert kept < PAGES


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not environment() or not HUGE.exists() or "[never]" in HUGE.read_text(), reason="no jemalloc, or no huge pages")
def test_large_tensors_lie_in_huge_pages():
    held = f"held = bytearray({64 << 20}); print(open('/proc/self/smaps_rollup').read())"
    told = subprocess.run([sys.executable, "-c", held], env={**os.environ, **environment()}, check=True, capture_output=True, text=True).stdout
    (huge,) = (int(line.split()[1]) for line in told.splitlines() if line.startswith("AnonHugePages"))
    assert huge > 32 << 10, "kB, of 64 MB"


def test_another_allocator_is_left_alone():
    assert len(faults({})) == 2, "it ran to its end"
