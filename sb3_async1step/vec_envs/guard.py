"""Keep a VecEnv whole while workers step its parts, and say what happened when one of its processes died."""

import operator
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from threading import Thread
from typing import Any, NoReturn

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_async1step.sb3_internals import REQUEST_ANSWERED_BY_FALSE, REQUEST_OF_AN_ATTRIBUTE

# What callbacks may call on the training env. It would talk to envs (or to pipes) that workers use
QUERIES = ("env_is_wrapped", "env_method", "get_attr", "get_images", "set_attr")
STEPS = ("reset", "step_async")
# What to do with a VecEnv whose processes have ended
MAKE_ANEW = "make the env anew and give it to the model by set_env()"


@contextmanager
def guard_vec_env(env: VecEnv, standing_still: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """
    Inside the ``with`` block, calls of the VecEnv's methods wait until no worker steps, and steps and resets raise.

    :param env: the VecEnv whose parts are stepped by workers
    :param standing_still: makes the workers stand still
    """
    base = env.unwrapped

    def make_wait(method: Callable) -> Callable:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with standing_still():
                return method(*args, **kwargs)

        return call

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("The workers of learn() step this env: nobody else may step or reset it until learn() ends.")

    for name in QUERIES:
        setattr(base, name, make_wait(getattr(base, name)))
    for name in STEPS:
        setattr(base, name, refuse)
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
    any other exception, no answers to earlier calls are on their way. A terminal's Ctrl-C interrupts all processes of
    its program; those of the VecEnv ignore it.

    :param env: the VecEnv; one of another class is left alone
    :raises RuntimeError: if a process died (names its lane), or the VecEnv is closed
    """
    base = env.unwrapped
    if not isinstance(base, SubprocVecEnv):
        yield
        return
    if base.closed:
        raise RuntimeError(f"The env is closed, or one of its processes has ended: {MAKE_ANEW}.")
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
        ignore_ctrl_c(base)
        yield
        heed_ctrl_c(base)
    except BaseException as exception:
        if isinstance(exception, (EOFError, OSError)):
            # A pipe may break before the process is seen to have ended
            watcher.join(timeout=1.0)
            if deaths:
                raise RuntimeError(
                    f"{deaths[0]} If it raised an exception, its traceback was printed. To go on, {MAKE_ANEW}."
                ) from exception
        recover(base)
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


def recover(env: SubprocVecEnv) -> None:
    """
    :param env: interrupted in a step or a reset; it can be used again, or it is closed
    """
    try:
        heed_ctrl_c(env)
    except (EOFError, OSError, KeyboardInterrupt):
        # The processes have ended, or Ctrl-C was pressed again while an env did not answer
        end_processes(env)


class Call:
    """
    A call that the process makes that unpickles it.

    :param function: its result is what the other process gets in place of this object
    :param args: the function's arguments
    """

    def __init__(self, function: Callable, *args: Any) -> None:
        self.function = function
        self.args = args

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.function, self.args


def on_ctrl_c(handler: Any, argument: Any) -> Any:
    """
    :param handler: what the process that receives the argument does from then on when it is interrupted
    :param argument: of a request to a process
    :return: the same argument for that process
    """
    return Call(operator.getitem, [Call(signal.signal, signal.SIGINT, handler), argument], 1)


def ignore_ctrl_c(env: SubprocVecEnv) -> None:
    """
    :param env: its processes ignore Ctrl-C from then on
    :raises EOFError: if a process ended
    :raises OSError: if a pipe is broken
    """
    command, argument = REQUEST_OF_AN_ATTRIBUTE
    for remote in env.remotes:
        remote.send((command, on_ctrl_c(signal.SIG_IGN, argument)))
    for remote in env.remotes:
        remote.recv()


def heed_ctrl_c(env: SubprocVecEnv) -> None:
    """
    Undo :func:`ignore_ctrl_c`, and throw away what the processes still answer to an interrupted step or reset.

    :param env: the VecEnv
    :raises EOFError: if a process ended
    :raises OSError: if a pipe is broken
    """
    command, argument = REQUEST_ANSWERED_BY_FALSE
    for remote in () if env.closed else env.remotes:
        remote.send((command, on_ctrl_c(signal.default_int_handler, argument)))
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
