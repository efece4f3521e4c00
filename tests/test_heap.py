"""Memory that worker threads free is used again."""

import os
import platform
import subprocess
import sys

import pytest

# Page faults of a thread that again and again asks for, and frees, what a batch of Atari's images may need
SCRIPT = """
import resource, threading
import torch as th
from sb3_async1step.common.heap import keep_freed_memory

def work(counts):
    for i in range(220):
        if i == 20:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        images, activations = th.zeros(4, 2**20), th.zeros(2**20)
        gradient = th.zeros(2**20)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

counts = []
for _ in range(2):
    thread = threading.Thread(target=work, args=[counts])
    thread.start()
    thread.join()
    keep_freed_memory()
print(*counts)
"""


def count_page_faults(**environment):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    return map(int, result.stdout.split())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_kept():
    before, after = count_page_faults()
    assert after < before / 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_settings_of_the_user_are_left_alone():
    before, after = count_page_faults(MALLOC_ARENA_MAX="8")
    assert after > before / 2
