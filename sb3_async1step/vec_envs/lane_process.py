"""The process of an env: what it does, and what the program does with it."""

import math
import os
import pickle
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any
from weakref import WeakSet

import gymnasium as gym
from stable_baselines3.common.vec_env import CloudpickleWrapper

from sb3_async1step.sb3_internals import answer_requests, replace_results_writer
from sb3_async1step.vec_envs.monitor_file import ContinuedResultsWriter

#: Seconds between two looks at the clock while a process does not answer
POLL_INTERVAL = 0.1
#: Seconds that a process has to end by itself, and to heed SIGTERM
PROCESS_END_TIMEOUT = 5.0
SIGTERM_TIMEOUT = 1.0

#: Ends of the pipes between this process and those of envs. A forked process inherits them; as long as it holds the end
#: of another env's process, the end of that process goes unnoticed, and so does the end of the program
PIPE_ENDS: WeakSet[Connection] = WeakSet()


@dataclass
class LaneSettings:
    """
    What the lanes of a VecEnv have in common.

    :param context: how processes are started
    :param step_timeout: seconds that an env has for a step, a reset or any other request
    :param start_timeout: seconds until a new process has made its env
    :param max_restarts: number of restarts of a lane within ``restart_window``, or one after another without a step
        between them, that do not end the training
    :param restart_window: seconds for which a restart counts
    :param give_up_at: when nobody waits for an answer any longer (``time.monotonic()``)
    """

    context: BaseContext
    step_timeout: float
    start_timeout: float
    max_restarts: int
    restart_window: float
    give_up_at: float = math.inf


# ---------------------------------------------------------------------- what the process does


class EnvError:
    """
    An exception of an env, on its way to another process.

    :param exception: the exception
    """

    def __init__(self, exception: Exception) -> None:
        self.summary = "".join(traceback.format_exception_only(exception)).strip()
        self.traceback = "".join(traceback.format_exception(exception))
        self._pickled = b""
        # cloudpickle would copy a class of the program's main module, which then is another class
        for picklable in (CloudpickleWrapper(exception), exception):
            with suppress(Exception):
                self._pickled = pickle.dumps(picklable)

    def restore(self) -> Exception:
        """
        :return: the exception, or a ``RuntimeError`` in place of one that can't be pickled
        """
        with suppress(Exception):
            exception = pickle.loads(self._pickled)
            return exception.var if isinstance(exception, CloudpickleWrapper) else exception
        return RuntimeError(self.summary)


class RemoteTraceback(Exception):
    """The cause of an exception of another process: it shows the traceback that the exception has there."""


def run_lane(remote: Connection, parent_remote: Connection, env_fn: CloudpickleWrapper, is_restarted: bool) -> None:
    """
    Make an env, and answer requests until it is closed. This is all that the process does.

    :param remote: this process's end of the pipe
    :param parent_remote: the other end
    :param env_fn: function that makes the env
    :param is_restarted: whether the env was made before, by another process
    :raises Exception: the exception of the env, after it was sent as an ``EnvError``
    """
    # A terminal's Ctrl-C is for the program alone. What the program does at SIGTERM, a forked process would do, too
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in list(PIPE_ENDS):
        if end is not remote:
            end.close()
    if is_restarted:
        replace_results_writer(ContinuedResultsWriter)
    try:
        answer_requests(remote, parent_remote, env_fn)
    except Exception as exception:
        try:
            remote.send(EnvError(exception))
        except OSError:
            # The program was killed: nobody is left who waits for an answer
            return
        raise


# ---------------------------------------------------------------------- what the program does with it


class LaneFailure(Exception):
    """
    The process of an env does not go on.

    :param reason: what happened
    :param error: the exception of the env, if it raised one
    """

    def __init__(self, reason: str, error: EnvError | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.error = error


class LaneProcess:
    """
    The process of an env, and the pipe to it.

    :param name: of the process
    :param env_fn: function that makes the env
    :param is_restarted: whether the env was made before, by another process
    :param settings: those of the VecEnv
    """

    def __init__(self, name: str, env_fn: Callable[[], gym.Env], is_restarted: bool, settings: LaneSettings) -> None:
        self._settings = settings
        # When this end is closed, the process ends by itself, whatever may have been interrupted here
        self._connection, self._remote = settings.context.Pipe()
        PIPE_ENDS.update((self._connection, self._remote))
        limit_blocking(self._connection, settings.step_timeout, settings.start_timeout)
        arguments = (self._remote, self._connection, CloudpickleWrapper(env_fn), is_restarted)
        make: Any = settings.context
        self.process = make.Process(target=run_lane, args=arguments, name=name, daemon=True)
        #: How the process has ended, None if it has not
        self.exitcode: int | None = None
        self._has_answered = False
        self._waiting_since = 0.0

    def start(self) -> None:
        """Start the process."""
        self.process.start()
        self._remote.close()

    def send(self, messages: Sequence[memoryview]) -> None:
        """
        :param messages: pickled requests; if they can't be sent, the answer tells why
        """
        self._waiting_since = time.monotonic()
        with suppress(OSError):
            for message in messages:
                self._connection.send_bytes(message)

    def wait(self) -> None:
        """
        Wait for an answer.

        :raises LaneFailure: if the process has ended, or the answer does not come in time
        :raises RuntimeError: if the training ends meanwhile
        """
        is_late = False
        while not (ready := wait(self.waitables, POLL_INTERVAL)):
            now = time.monotonic()
            if now > self._settings.give_up_at:
                raise RuntimeError(f"{self.process.name} had not answered when the training ended.")
            # Wait once more: it may have been suspended together with this process
            if is_late:
                raise self._describe_delay()
            is_late = now > self._waiting_since + self._timeout
        # It may have answered and ended after wait() had looked at the pipe
        if self._connection not in ready and not self._connection.poll():
            raise self._describe_end()

    @property
    def waitables(self) -> list[Any]:
        """What ``multiprocessing.connection.wait()`` takes: one of them is ready if there is news."""
        return [self._connection, self.process.sentinel]

    def has_news(self) -> bool:
        """
        :return: whether it has answered, has ended, or should have answered by now
        """
        return bool(wait(self.waitables, 0)) or time.monotonic() > self._waiting_since + self._timeout

    def receive(self) -> Any:
        """
        :return: an answer
        :raises LaneFailure: if there is none
        """
        try:
            answer = self._connection.recv()
        except BlockingIOError:
            raise self._describe_delay() from None
        except (EOFError, OSError):
            raise self._describe_end() from None
        if isinstance(answer, EnvError):
            raise LaneFailure(f"it raised {answer.summary}", answer)
        self._has_answered = True
        self._waiting_since = time.monotonic()
        return answer

    @property
    def _timeout(self) -> float:
        return self._settings.step_timeout if self._has_answered else self._settings.start_timeout

    def _describe_delay(self) -> LaneFailure:
        return LaneFailure(f"it did not answer within {self._timeout:g} s")

    def _describe_end(self) -> LaneFailure:
        self.end(PROCESS_END_TIMEOUT)
        return LaneFailure(f"its process {describe_end(self.exitcode)}")

    def end(self, patience: float) -> None:
        """
        Wait until the process has ended by itself, or end it. If this is interrupted, it can be called again.

        :param patience: seconds to wait
        """
        process = self.process
        if self.exitcode is None and process.pid is not None:
            # select() can't wait for more than 24 days
            process.join(min(patience, 1e6))
            if process.is_alive():
                process.terminate()
                process.join(SIGTERM_TIMEOUT)
            if process.is_alive():
                process.kill()
                process.join(PROCESS_END_TIMEOUT)
            self.exitcode = process.exitcode
        if self.exitcode is not None:
            # This also releases its file descriptors
            process.close()
        self._connection.close()
        self._remote.close()


def describe_end(exitcode: int | None) -> str:
    """
    :param exitcode: a process's exit code, negative for a signal
    :return: how it ended, in words
    """
    if exitcode is None:
        return "ended"
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    name = ""
    with suppress(ValueError):
        name = f" ({signal.Signals(-exitcode).name})"
    return f"was killed by signal {-exitcode}{name}"


def limit_blocking(connection: Connection, receiving: float, sending: float) -> None:
    """
    Keep a process that stops in the middle of a long message from holding up this one. Windows has no such limit.

    :param connection: end of a pipe
    :param receiving: seconds after which receiving raises ``BlockingIOError``
    :param sending: seconds after which sending does
    """
    if sys.platform == "win32":
        return
    with socket.socket(fileno=os.dup(connection.fileno())) as pipe:
        for option, limit in ((socket.SO_RCVTIMEO, receiving), (socket.SO_SNDTIMEO, sending)):
            # Zero means no limit
            seconds = 0.0 if math.isinf(limit) else limit
            pipe.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))
