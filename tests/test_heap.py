"""The C library's heap is set up where it can be, unless the user did it."""

import os
import platform
from types import SimpleNamespace

import pytest
from stable_baselines3.common.callbacks import BaseCallback

from sb3_async1step.common import heap
from tests.envs import make_env


@pytest.fixture
def calls(monkeypatch):
    """Calls of ``mallopt()`` and ``malloc_trim()``, which do nothing."""
    calls = []
    libc = SimpleNamespace(
        mallopt=lambda parameter, value: calls.append((parameter, value)),
        malloc_trim=lambda pad: calls.append(("trim", pad)),
    )
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    for name in os.environ:
        if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES":
            monkeypatch.delenv(name)
    return calls


KEEPS_MEMORY = [(-3, 32 * 2**20), (-1, 256 * 2**20)]


@pytest.mark.parametrize(("n_workers", "expected"), [(1, []), (2, KEEPS_MEMORY)])
def test_learning_on_several_threads_keeps_freed_memory(algorithm, calls, n_workers, expected):
    algorithm("MlpPolicy", make_env(2), n_workers=n_workers).learn(20)
    assert calls == expected


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_settings_of_the_user_are_left_alone(monkeypatch, calls, name):
    monkeypatch.setenv(name, "")
    heap.keep_freed_memory()
    assert calls == []


def test_other_c_libraries_are_left_alone(monkeypatch, calls):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    heap.keep_freed_memory()
    assert calls == []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_glibc_takes_the_values():
    libc = heap.ctypes.CDLL(None)
    assert [libc.mallopt(parameter, value) for parameter, value in KEEPS_MEMORY] == [1, 1]


@pytest.fixture
def sizes(monkeypatch, tmp_path):
    """Write a size of the process, in MiB, at which the heap is always looked."""
    statm = tmp_path / "statm"
    monkeypatch.setattr(heap, "STATM", statm)
    monkeypatch.setattr(heap, "TRIM_INTERVAL", 0.0)

    def write(n_mebibytes):
        statm.write_text(f"9999999 {n_mebibytes * 2**20 // os.sysconf('SC_PAGE_SIZE')} 1 1 0 1 0\n")

    write(400)
    return write


def test_freed_memory_is_returned_when_the_process_has_grown(calls, sizes):
    trimmer = heap.HeapTrimmer()
    n_trims = []
    # It shrinks to 500, from where it may grow again
    for size in (400, 656, 657, 500, 913, 914, 1169, 1171):
        sizes(size)
        trimmer.trim_when_due()
        n_trims.append(len(calls))
    assert n_trims == [0, 0, 1, 1, 1, 2, 2, 3]
    assert set(calls) == {("trim", 0)}


def test_the_heap_is_looked_at_now_and_then_only(monkeypatch, calls, sizes):
    clock = SimpleNamespace(now=0)
    monkeypatch.setattr(heap, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(heap, "TRIM_INTERVAL", 10)
    trimmer = heap.HeapTrimmer()
    n_trims = []
    for clock.now in (9, 10, 19, 20, 29):
        # It has grown by 1000 MiB each time
        sizes(1000 * (len(n_trims) + 2))
        trimmer.trim_when_due()
        n_trims.append(len(calls))
    assert n_trims == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("n_workers", [1, 2])
def test_learning_returns_freed_memory(algorithm, calls, sizes, n_workers):
    class Grow(BaseCallback):
        def _on_step(self):
            sizes(400 * self.n_calls)
            return True

    algorithm("MlpPolicy", make_env(2), n_workers=n_workers).learn(20, Grow())
    # 400 MiB more at each of ten steps but the first
    assert calls.count(("trim", 0)) == 9


@pytest.mark.parametrize("reason", ["another system", "another C library", "the user's settings"])
def test_freed_memory_is_not_returned_where_it_cannot_or_should_not_be(monkeypatch, calls, sizes, reason):
    if reason == "another system":
        heap.STATM.unlink()
    elif reason == "another C library":
        monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    else:
        monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    trimmer = heap.HeapTrimmer()
    sizes(5000)
    trimmer.trim_when_due()
    assert calls == []


@pytest.mark.skipif(not heap.STATM.exists(), reason="needs Linux")
def test_the_size_of_the_process():
    resource = pytest.importorskip("resource")
    resident = heap.read_resident_memory()
    # That of this process with PyTorch, and less than the largest so far
    assert 50 * 2**20 < resident <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 2**20
