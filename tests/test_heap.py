"""The C library's heap is set up where it can be, unless the user did it."""

import os
import platform
from types import SimpleNamespace

import pytest

from sb3_async1step.common import heap
from tests.envs import make_env


@pytest.fixture
def calls(monkeypatch):
    """Calls of ``mallopt()``, which do nothing."""
    calls = []
    libc = SimpleNamespace(mallopt=lambda parameter, value: calls.append((parameter, value)))
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
