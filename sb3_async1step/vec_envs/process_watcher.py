"""Notice that a process of a SubprocVecEnv has died, and keep Ctrl-C away from its processes."""

import math
import operator
import os
import signal
import time
import warnings
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from threading import Thread
from typing import Any

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_async1step.sb3_internals import REQUEST_ANSWERED_BY_NOT_IMPLEMENTED, REQUEST_OF_AN_ATTRIBUTE
from sb3_async1step.vec_envs.healing_vec_env import HealingVecEnv
from sb3_async1step.vec_envs.lane_process import describe_end
from sb3_async1step.vec_envs.split import find_base

# What to do with a VecEnv whose processes have ended
MAKE_ANEW = "make the env anew and give it to the model by set_env()"
#: Seconds that processes have to answer when a training was interrupted
INTERRUPT_TIMEOUT = 1.0
#: Seconds in which the watcher sees that a process has ended whose pipe is broken
DEATH_TIMEOUT = 1.0


class ProcessWatcher:
    """
    While it watches, the death of one of a ``SubprocVecEnv``'s processes ends the others as well: such a VecEnv can't
    be used (nor closed in SB3's way) any more, and who waits for an answer might wait forever. A terminal's Ctrl-C
    interrupts all processes of its program; those of the VecEnv ignore it.

    :param env: the VecEnv; one of another class is left alone
    """

    def __init__(self, env: VecEnv) -> None:
        self._env = find_base(env)
        self._thread = Thread(target=self._watch, name="process-watcher", daemon=True)
        self._is_watching = False
        # Whether start() has seen the thread begin, and whether end() was called
        self._was_started = False
        self._is_ended = False
        self._deaths: list[str] = []
        self._reader, self._writer = Pipe(duplex=False)

    def start(self) -> None:
        """
        Watch from now on.

        :raises RuntimeError: if the VecEnv is closed
        """
        if not isinstance(self._env, SubprocVecEnv):
            return
        if self._env.closed:
            raise RuntimeError(f"The env is closed, or one of its processes has ended: {MAKE_ANEW}.")
        self._begin(self._env)

    def _begin(self, env: SubprocVecEnv) -> None:
        self._is_watching = True
        self._thread.start()
        self._was_started = True
        ignore_ctrl_c(env)

    def _watch(self) -> None:
        assert isinstance(self._env, SubprocVecEnv)
        try:
            if self._is_ended and not self._was_started:
                # An interrupt of Thread.start(), and so much later that the next learn() may be running
                return
            ended = wait([process.sentinel for process in self._env.processes] + [self._reader])
            for lane, process in enumerate(self._env.processes):
                if process.sentinel in ended:
                    process.join()
                    self._deaths.append(f"The process of env lane {lane} {describe_end(process.exitcode)}.")
            if not self._deaths:
                # On this thread, which no Ctrl-C interrupts
                heed_ctrl_c(self._env)
        except (EOFError, OSError):
            self._deaths.append("A process of the env ended.")
        finally:
            if self._deaths:
                end_processes(self._env)
            self._is_watching = False

    def check(self, exception: BaseException) -> None:
        """
        :param exception: an exception of the training
        :raises RuntimeError: if its cause is a process that died; names the lane
        """
        if not isinstance(exception, (EOFError, OSError)):
            return
        # A pipe may break before the process is seen to have ended
        deadline = time.monotonic() + DEATH_TIMEOUT
        while self._is_watching and not self._deaths and time.monotonic() < deadline:
            time.sleep(0.001)
        if self._deaths:
            raise RuntimeError(
                f"{self._deaths[0]} If it raised an exception, its traceback was printed. To go on, {MAKE_ANEW}."
            ) from exception

    def hurry(self) -> None:
        """Stop waiting for lanes that hang, if they can be replaced."""

    def end(self, patience: float = math.inf) -> None:
        """
        Watch no longer, and throw away what the processes still answer to an interrupted step or reset. If this is
        interrupted, it can be called again.

        :param patience: seconds that the processes have for these answers. If they don't come, the processes are ended
        """
        try:
            self._stop(patience)
        except KeyboardInterrupt:
            # The first one, which came only now; or it was pressed again while an env does not answer
            self._stop(INTERRUPT_TIMEOUT)
            raise
        finally:
            if self._is_watching and self._thread.is_alive() and isinstance(self._env, SubprocVecEnv):
                end_processes(self._env)
                warnings.warn(
                    f"A process of the env did not answer within {INTERRUPT_TIMEOUT:g} s after the training was "
                    f"interrupted, so they were all ended. To go on, {MAKE_ANEW}.",
                    stacklevel=2,
                )

    def _stop(self, patience: float) -> None:
        """Wait for the end of the watch, but not longer than ``patience`` seconds."""
        self._is_ended = True
        # Not just closed: a process that was forked meanwhile holds this end of the pipe, too
        self._writer.send(None)
        deadline = time.monotonic() + patience
        while self._is_watching and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)


class HealingWatcher(ProcessWatcher):
    """
    For a ``HealingVecEnv``, which looks after its processes by itself: it only has to be told when nobody waits for its
    lanes any more.

    :param env: the VecEnv
    """

    _env: HealingVecEnv

    def _begin(self, env: SubprocVecEnv) -> None:
        # An interrupted end may have left it so
        self._env.end_hurry()

    def hurry(self) -> None:
        """Lanes that hang shall not hold up the end of the training."""
        self._env.hurry()

    def end(self, patience: float = math.inf) -> None:
        """
        Lanes may take their time again.

        :param patience: see :class:`ProcessWatcher`
        """
        self._env.end_hurry()


def make_process_watcher(env: VecEnv) -> ProcessWatcher:
    """
    :param env: the training env
    :return: what watches its processes, if it has any
    """
    return HealingWatcher(env) if isinstance(find_base(env), HealingVecEnv) else ProcessWatcher(env)


def end_processes(env: SubprocVecEnv) -> None:
    """
    Kill the processes of a VecEnv, and mark it as closed.

    :param env: the VecEnv
    """
    for process in env.processes:
        process.kill()
        process.join()
    env.closed = True


class RemoteCall:
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
    return RemoteCall(operator.getitem, [RemoteCall(signal.signal, signal.SIGINT, handler), argument], 1)


def ignore_ctrl_c(env: SubprocVecEnv) -> None:
    """
    Let the processes of a VecEnv ignore Ctrl-C.

    :param env: the VecEnv
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
    Undo :func:`ignore_ctrl_c`, and throw away what the processes still answer to an interrupted step, reset or any
    other request.

    :param env: the VecEnv
    :raises EOFError: if a process ended
    :raises OSError: if a pipe is broken
    """
    command, argument = REQUEST_ANSWERED_BY_NOT_IMPLEMENTED
    for remote in () if env.closed else env.remotes:
        remote.send((command, on_ctrl_c(signal.default_int_handler, argument)))
        # On Windows, a pipe is no Connection but a PipeConnection
        read = read_bytes_until if isinstance(remote, Connection) else read_messages_until
        read(remote, NotImplemented)
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
