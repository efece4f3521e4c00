"""Keep a VecEnv whole while workers step its parts, and say what happened when one of its processes died."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from threading import Thread
from typing import Any, NoReturn

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_async1step.sb3_internals import REQUEST_ANSWERED_BY_FALSE

# What callbacks may call on the training env. It would talk to envs (or to pipes) that workers use
QUERIES = ("env_is_wrapped", "env_method", "get_attr", "get_images", "set_attr")
STEPS = ("reset", "step_async")


class GuardedMethod(partial):
    """A function that takes a method's place. In a copy of the env, there are no workers: it is the method again."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        method = self.args[0]
        return getattr, (method.__self__, method.__name__)


@contextmanager
def guard_vec_env(env: VecEnv, standing_still: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """
    Inside the ``with`` block, calls of the VecEnv's methods wait until no worker steps, and steps and resets raise.

    :param env: the VecEnv whose parts are stepped by workers
    :param standing_still: makes the workers stand still
    """
    base = env.unwrapped

    def wait(method: Callable, *args: Any, **kwargs: Any) -> Any:
        with standing_still():
            return method(*args, **kwargs)

    def refuse(method: Callable, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("The workers of learn() step this env: nobody else may step or reset it until learn() ends.")

    for name in QUERIES:
        setattr(base, name, GuardedMethod(wait, getattr(base, name)))
    for name in STEPS:
        setattr(base, name, GuardedMethod(refuse, getattr(base, name)))
    try:
        yield
    finally:
        for name in (*QUERIES, *STEPS):
            delattr(base, name)


@contextmanager
def watch_processes(env: VecEnv) -> Iterator[None]:
    """
    Inside the ``with`` block, the death of one of a ``SubprocVecEnv``'s processes ends the others as well: such a
    VecEnv can't be used (nor closed in SB3's way) any more, and who waits for an answer might wait forever. After
    any other exception, no answers to earlier calls are on their way.

    :param env: the VecEnv; one of another class is left alone
    :raises RuntimeError: if a process died; names its lane
    """
    base = env.unwrapped
    if not isinstance(base, SubprocVecEnv) or base.closed:
        yield
        return
    deaths: list[str] = []
    stop_reader, stop_writer = Pipe(duplex=False)

    def watch() -> None:
        ended = wait([process.sentinel for process in base.processes] + [stop_reader])
        for lane, process in enumerate(base.processes):
            if process.sentinel in ended:
                process.join()
                deaths.append(f"The process of env lane {lane} {describe_exit(process.exitcode)}.")
        if deaths:
            end_processes(base)

    watcher = Thread(target=watch, name="process-watcher", daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as exception:
        if isinstance(exception, (EOFError, OSError)):
            # A pipe may break before the process is seen to have ended
            watcher.join(timeout=1.0)
            if deaths:
                raise RuntimeError(f"{deaths[0]} If it raised an exception, its traceback was printed.") from exception
        with suppress(EOFError, OSError):
            # Unless Ctrl-C ended them, too
            discard_replies(base)
        raise
    finally:
        # Not just closed: a process that was forked meanwhile holds this end of the pipe, too
        stop_writer.send(None)
        watcher.join()
        stop_writer.close()
        stop_reader.close()


def describe_exit(exitcode: int | None) -> str:
    """
    :param exitcode: a process's exit code, negative for a signal
    :return: in words
    """
    return f"was killed by signal {-exitcode}" if exitcode is not None and exitcode < 0 else "ended"


def end_processes(env: SubprocVecEnv) -> None:
    """
    :param env: its processes are killed; it is closed from then on
    """
    for process in env.processes:
        process.kill()
        process.join()
    env.closed = True


def discard_replies(env: SubprocVecEnv) -> None:
    """
    Throw away what the processes still answer to an interrupted step or reset.

    :param env: the VecEnv
    :raises EOFError: if a process ended
    :raises OSError: if a pipe is broken
    """
    for remote in env.remotes:
        remote.send(REQUEST_ANSWERED_BY_FALSE)
        # On Windows, a pipe is no Connection but a PipeConnection
        read = read_bytes_until if isinstance(remote, Connection) else read_messages_until
        read(remote, False)
    env.waiting = False


def read_messages_until(remote: Any, last: Any) -> None:
    """
    Read messages from a pipe of Windows. It keeps their boundaries: if the beginning of one was taken when receiving it
    was interrupted, the next message is its rest. (Its ``fileno()`` is a handle, which ``os.read()`` can't read.)

    :param remote: end of a pipe, a ``PipeConnection``
    :param last: the last message on the way, something small
    :raises EOFError: if the pipe was closed before
    """
    end = bytes(ForkingPickler.dumps(last))
    while remote.recv_bytes() != end:
        pass


def encode_message(message: Any) -> bytes:
    """
    :param message: something small
    :return: the bytes by which a pipe that is a stream carries it
    """
    reader, writer = Pipe(duplex=False)
    with reader, writer:
        writer.send(message)
        return os.read(reader.fileno(), 2**16)


def read_bytes_until(remote: Connection, last: Any) -> None:
    """
    Read bytes, not messages: in a stream, nothing tells where a message begins whose beginning was taken when receiving
    it was interrupted.

    :param remote: end of a pipe
    :param last: the last message on the way, something small
    :raises EOFError: if the pipe was closed before
    """
    end = encode_message(last)
    received = b""
    while received != end:
        chunk = os.read(remote.fileno(), 2**16)
        if not chunk:
            raise EOFError
        received = (received + chunk)[-len(end) :]
