"""The gate between the threads that change a model or step its environments, and those that want it to stand still."""

import inspect
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

#: Seconds after which a waiting thread looks whether it waits for a call that was interrupted
RECHECK_INTERVAL = 0.05
#: Seconds that a fork waits for workers to end their steps, at most: one of them may wait for the thread that forks
FORK_TIMEOUT = 5.0
#: Seconds that a thread that only looks at a model waits for its workers, at most: one of them may wait for that thread
LOOK_TIMEOUT = 1.0


@dataclass(eq=False, slots=True, weakref_slot=True)
class Call:
    """
    A call of a function, which may end without a trace: a ``KeyboardInterrupt`` can be raised between any two bytecodes
    of the main thread, in a ``finally`` clause, too, and a fork copies the calling thread only.

    :param frame: frame of the call, not of a generator
    """

    frame: FrameType
    thread_id: int = field(default_factory=threading.get_ident)
    process_id: int = field(default_factory=os.getpid)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        if self.process_id != os.getpid():
            return False
        # Python clears a frame only if its call has ended. To look for it on the stack of another thread, which runs on
        # meanwhile, is not safe: frame.f_back may be freed memory (CPython 3.11)
        try:
            self.frame.clear()
        except RuntimeError:
            return True
        return False


class Calls:
    """Calls in the order in which they were added. Other threads see each change as a whole, without a lock."""

    def __init__(self) -> None:
        self._calls: dict[Call, None] = {}

    def __bool__(self) -> bool:
        return bool(self._calls)

    def __contains__(self, call: Call) -> bool:
        return call in self._calls

    def add(self, call: Call) -> None:
        """
        :param call: a call
        """
        self._calls[call] = None

    def discard(self, call: Call) -> bool:
        """
        :param call: a call
        :return: whether it was there
        """
        return self._calls.pop(call, self) is None

    def claim(self, call: Call) -> bool:
        """
        Add a call, unless another one that is still running is there.

        :param call: the call
        :return: whether it was added
        """
        self.forget_ended()
        self.add(call)
        if self.list()[0] is call:
            return True
        self.discard(call)
        return False

    def list(self) -> list[Call]:
        """
        :return: the calls
        """
        return list(self._calls)

    def is_by_this_thread(self) -> bool:
        """
        :return: whether one of them was made by the calling thread, and has not ended yet
        """
        thread_id = threading.get_ident()
        return any(call.thread_id == thread_id and call.is_running for call in self.list())

    def forget_ended(self) -> None:
        """Discard the calls that were interrupted before they could do so."""
        for call in self.list():
            if not call.is_running:
                self.discard(call)


class Gate:
    """
    A shared-exclusive lock. Workers, which change the model, share it; a thread that reads or replaces the model as a
    whole waits until nobody is inside, and keeps the gate closed meanwhile. A model has one gate all its life, so that
    a training waits for those that closed it before.

    It is fair: a thread that closes the gate lets those pass first that wait in front of it.

    Nothing in it can be left locked by an interrupted call. Each thread first says what it is about to do, and then
    looks whether it may; what a call has left behind is forgotten once somebody waits for it.
    """

    def __init__(self) -> None:
        self._learning = Calls()
        self._closing = Calls()
        self._inside = Calls()
        self._waiting = Calls()
        # Threads that wait for something, and the locks by whose release others wake them
        self._sleeping: dict[Call, threading.Lock] = {}
        _gates.add(self)

    def __reduce__(self) -> tuple[type["Gate"], tuple]:
        # A copy of the model starts with no threads
        return type(self), ()

    # ------------------------------------------------------------------ one learn() at a time

    def begin_learning(self, call: Call) -> bool:
        """
        Begin to learn, unless another call of ``learn()`` is running.

        :param call: a call of ``learn()``
        :return: whether no other one is running
        """
        return self._learning.claim(call)

    def end_learning(self, call: Call) -> None:
        """
        Undo :meth:`begin_learning`.

        :param call: what that was given
        """
        self._learning.discard(call)

    def is_learning(self) -> bool:
        """
        :return: whether a call of ``learn()`` is running, in this process
        """
        return any(call.is_running for call in self._learning.list())

    # ------------------------------------------------------------------ closing and passing

    def closed(self) -> "_Closed":
        """
        Wait until no thread is inside, and keep all threads from entering until the end of the ``with`` block. Any
        thread may call this; threads that call it at the same time take turns.

        :return: a context manager
        """
        return _Closed(self)

    def closed_to_look(self) -> "_Closed":
        """
        Like :meth:`closed`, for a look at the model that does not change it. In a step of any model it does not wait:
        two models whose envs play against each other would wait for each other. Other threads than that of ``learn()``
        wait for ``LOOK_TIMEOUT`` seconds at most, since a step may wait for them.

        :return: a context manager; its ``as`` target is False if it has stopped waiting for a step
        """
        return _Closed(self, math.inf if self._learning.is_by_this_thread() else LOOK_TIMEOUT, only_looks=True)

    def passed(self, when: Callable[[], bool] = lambda: True) -> "_Passed":
        """
        Wait until the gate is open, and be inside until the end of the ``with`` block, in which the calling thread
        changes the model.

        :param when: a further condition; whoever makes it true calls :meth:`notify`
        :return: a context manager
        """
        return _Passed(self, when)

    def is_inside(self) -> bool:
        """
        :return: whether the calling thread is inside
        """
        return self._inside.is_by_this_thread()

    def close(self, call: Call, timeout: float = math.inf) -> bool:
        """
        Close the gate until :meth:`open`, and wait until nobody is inside. Nothing happens if this thread is inside, or
        has closed it already.

        :param call: who closes it
        :param timeout: seconds to wait at most
        :return: False if it has stopped waiting for a thread that is inside
        """
        if self.is_inside() or self._closing.is_by_this_thread():
            # An env that plays against the model, say. It would wait for itself
            return True
        deadline = time.monotonic() + timeout
        self.wait_for(lambda: not self._waiting or time.monotonic() > deadline)
        self._closing.add(call)
        # One after another: a file that is saved must not hold half of the parameters that another thread sets
        self.wait_for(lambda: self._is_closed_by(call) or (bool(self._inside) and time.monotonic() > deadline))
        return self._is_closed_by(call)

    def _is_closed_by(self, call: Call) -> bool:
        return not self._inside and self._closing.list()[0] is call

    def open(self, call: Call) -> None:
        """
        Open the gate again.

        :param call: what :meth:`close` was given
        """
        if self._closing.discard(call):
            self.notify()

    def enter(self, call: Call, when: Callable[[], bool]) -> None:
        """
        Wait until the gate is open, and go inside until :meth:`leave`.

        :param call: who goes inside
        :param when: a further condition
        """

        def may_enter() -> bool:
            if not when():
                # Nobody who closes the gate need wait for this call
                self._stop_waiting(call)
                return False
            if not self._closing:
                _inside_any.add(call)
                self._inside.add(call)
                # Unless it was closed between these two lines
                if not self._closing:
                    return True
                self.leave(call)
            self._waiting.add(call)
            return False

        try:
            self.wait_for(may_enter)
        finally:
            self._stop_waiting(call)

    def leave(self, call: Call) -> None:
        """
        Go outside again.

        :param call: what :meth:`enter` was given
        """
        self._inside.discard(call)
        _inside_any.discard(call)
        if self._closing:
            self.notify()

    def _stop_waiting(self, call: Call) -> None:
        if self._waiting.discard(call):
            self.notify()

    # ------------------------------------------------------------------ waiting

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """
        Wait until a condition is true.

        :param condition: the condition; whoever makes it true calls :meth:`notify`
        """
        if condition():
            return
        call, alarm = Call(sys._getframe()), threading.Lock()
        alarm.acquire()
        self._sleeping[call] = alarm
        try:
            while not condition():
                if not alarm.acquire(timeout=RECHECK_INTERVAL):
                    self._forget_interrupted_calls()
        finally:
            self._sleeping.pop(call, None)

    def notify(self) -> None:
        """Wake the threads that wait, so that they look again."""
        for alarm in list(self._sleeping.values()):
            # Unless another thread has been quicker
            with suppress(RuntimeError):
                alarm.release()

    def _forget_interrupted_calls(self) -> None:
        for calls in (self._closing, self._inside, self._waiting, _inside_any):
            calls.forget_ended()
        for call in list(self._sleeping):
            if not call.is_running:
                self._sleeping.pop(call, None)


# By hand: a context manager made from a generator could be interrupted before it has said whose call it is
class _Closed:
    def __init__(self, gate: Gate, timeout: float = math.inf, only_looks: bool = False) -> None:
        self._gate = gate
        self._timeout = timeout
        self._only_looks = only_looks

    def __enter__(self) -> bool:
        # The function with the ``with`` block
        self._call = Call(sys._getframe(1))
        if self._only_looks and _inside_any.is_by_this_thread():
            return True
        return self._gate.close(self._call, self._timeout)

    def __exit__(self, *exc_info: object) -> None:
        self._gate.open(self._call)


class _Passed:
    def __init__(self, gate: Gate, when: Callable[[], bool]) -> None:
        self._gate = gate
        self._when = when

    def __enter__(self) -> None:
        self._call = Call(sys._getframe(1))
        self._gate.enter(self._call, self._when)

    def __exit__(self, *exc_info: object) -> None:
        self._gate.leave(self._call)


# Calls of learn(), by the envs that they step
_learning_on: WeakKeyDictionary[Any, Calls] = WeakKeyDictionary()


def learning_on(env: Any) -> Calls:
    """
    :param env: a VecEnv, without its wrappers
    :return: the calls of ``learn()``, of any model, that step it: one, or none
    """
    return _learning_on.setdefault(env, Calls())


# Threads inside of any gate
_inside_any = Calls()

# A fork copies the locks that other threads hold inside of PyTorch, which nobody releases in the child
_gates: WeakSet[Gate] = WeakSet()
_closed_for_fork: dict[int, list[tuple[Gate, Call]]] = {}


def _close_gates() -> None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR:
        frame = frame.f_back
    assert frame is not None
    call = Call(frame)
    closed = _closed_for_fork[threading.get_ident()] = [(gate, call) for gate in _list_gates()]
    for gate, call in closed:
        gate.close(call, FORK_TIMEOUT)


def _list_gates() -> list[Gate]:
    while True:
        # Unless another thread makes one at this moment
        with suppress(RuntimeError):
            return list(_gates)


def _open_gates() -> None:
    for gate, call in _closed_for_fork.pop(threading.get_ident(), []):
        gate.open(call)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_close_gates, after_in_parent=_open_gates, after_in_child=_open_gates)
