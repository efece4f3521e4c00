"""One lane of a :class:`~sb3_async1step.HealingVecEnv`."""

import time
import warnings
from collections.abc import Callable
from enum import Enum, auto
from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np

from sb3_async1step.vec_envs.exceptions import add_note
from sb3_async1step.vec_envs.lane_process import (
    PROCESS_END_TIMEOUT,
    LaneFailure,
    LaneProcess,
    LaneSettings,
    RemoteTraceback,
)

#: A command for a process of a ``SubprocVecEnv``, and its argument
Request = tuple[str, Any]


class State(Enum):
    """State of the pipe to the process."""

    #: All answers have been received
    IDLE = auto()
    #: Requests have been sent, and nothing of the next answer has been received
    WAITING = auto()
    #: The process has failed, or an interrupt may have torn a message
    BROKEN = auto()


class RestartInfo(dict[str, Any]):
    """
    Info of the step in which a lane was restarted. The env has not said anything: ``VecMonitor``, which reads
    its ``info_keywords`` whenever an episode ends, gets None for each.
    """

    def __missing__(self, key: str) -> None:
        return None

    def copy(self) -> "RestartInfo":
        """
        :return: a copy that answers in the same way
        """
        return RestartInfo(self)


class HealingLane:
    """
    An env in a process that is replaced when it fails. ``SubprocVecEnv`` takes the lane for the end of a pipe: it sends
    requests, and receives answers.

    Ctrl-C may interrupt any of the methods. The next request goes on from there, or the process is replaced.

    :param number: of the lane
    :param env_fn: function that makes the env
    :param settings: those of the VecEnv
    """

    def __init__(self, number: int, env_fn: Callable[[], gym.Env], settings: LaneSettings) -> None:
        self.number = number
        self.n_restarts = 0
        #: Whether it has taken a step since the last restart
        self.has_stepped = True
        self.process: LaneProcess | None = None
        self._env_fn = env_fn
        # Whether a process has ever made the env
        self._was_made = False
        self._settings = settings
        self._is_closed = False
        self._close_by = 0.0

        self._state = State.BROKEN
        self._failure: LaneFailure | None = None
        self._request: Request = ("", None)
        # Commands whose answers are still to be received, and the last answer
        self._expected: list[str] = []
        self._answer: Any = None

        # What a new process needs to know
        self._seed: int | None = None
        self._attributes: dict[str, Any] = {}
        # The last observation that SubprocVecEnv has got, and what the process's last reset returned
        self._last_observation: Any = None
        self._last_reward: Any = 0.0
        self._first_answer: Any = None

        # Why the process was replaced, if SubprocVecEnv has not been told yet
        self._restart_reason: str | None = None
        self._restart_times: list[float] = []
        self._n_restarts_without_step = 0

    # ------------------------------------------------------------------ requests and answers

    def send(self, request: Request) -> None:
        """
        :param request: what to ask the process
        :raises RuntimeError: if the lane is closed
        """
        if self._is_closed:
            raise RuntimeError("The env is closed: make it anew.")
        # What can't be pickled is refused before anything is sent
        message = ForkingPickler.dumps(request)
        if self._state is State.WAITING:
            # The answer to a request whose caller was interrupted
            self._receive_all()
        self._request = request
        command, argument = request
        if command == "reset" and argument[0] is not None:
            self._seed = argument[0]
        self._expected = []
        # After a restart, the next step says that the episode has ended
        is_answered = command == "step" and self._restart_reason is not None
        if self._state is State.IDLE and not is_answered:
            self._transmit([command], [message])

    def settle(self) -> bool:
        """
        Wait for the answer. If the process fails, start another one, whose answer is the next to wait for.

        :return: whether the answer is there
        :raises Exception: if the process fails too often; the exception of an env that was asked for something else
            than a step or a reset
        """
        failure = self._receive_all()
        if failure is None:
            return True
        if failure.error is not None and self._request[0] not in ("step", "reset") and len(self._expected) == 1:
            # It may be the caller's mistake: an attribute that does not exist
            raise failure.error.restore() from RemoteTraceback(failure.error.traceback)
        self._restart(failure)
        return False

    def poll(self) -> bool:
        """
        Look for the answer without waiting for it. If the process has failed, start another one.

        :return: whether :meth:`recv` would return at once
        :raises Exception: see :meth:`settle`
        """
        try:
            while self._state is State.WAITING and self._expected:
                assert self.process is not None
                if not self.process.has_news():
                    return False
                self._receive()
        except LaneFailure as failure:
            self._state, self._failure = State.BROKEN, failure
        return self.settle()

    def list_waitables(self) -> list[Any]:
        """
        :return: what ``multiprocessing.connection.wait()`` takes to wait for news of the process
        """
        return [] if self.process is None else self.process.waitables

    def recv(self) -> Any:
        """
        :return: the answer to the last request; if the process failed in a step, that the episode was truncated
        :raises Exception: see :meth:`settle`
        """
        while not self.settle():
            pass
        command, argument = self._request
        if command == "step":
            return self._answer_step()
        if command == "reset":
            return self._answer_reset()
        if command == "set_attr":
            name, value = argument
            self._attributes[name] = value
        return self._answer

    def _answer_step(self) -> tuple:
        if self._restart_reason is None:
            self._last_observation, self._last_reward = self._answer[:2]
            self.has_stepped = True
            return self._answer
        info = RestartInfo(
            {
                "lane_restart": self._restart_reason,
                "terminal_observation": self._last_observation,
                "TimeLimit.truncated": True,
            }
        )
        self._restart_reason = None
        self._last_observation, reset_info = self._first_answer
        # Rewards of a lane may be arrays of one number
        return self._last_observation, np.zeros_like(self._last_reward)[()], True, info, reset_info

    def _answer_reset(self) -> tuple:
        self._last_observation, reset_info = self._first_answer
        if self._restart_reason is not None:
            reset_info = {**reset_info, "lane_restart": self._restart_reason}
        self._restart_reason = None
        return self._last_observation, reset_info

    def _transmit(self, commands: list[str], messages: list[memoryview]) -> None:
        assert self.process is not None
        self._state, self._failure, self._expected = State.BROKEN, None, commands
        self.process.send(messages)
        self._state = State.WAITING

    def _receive_all(self) -> LaneFailure | None:
        """Receive all answers that are expected, or return why that is not possible."""
        if self._state is State.BROKEN:
            return self._failure or LaneFailure("an interrupt may have torn its answer")
        try:
            while self._expected:
                self._receive()
        except LaneFailure as failure:
            self._state, self._failure = State.BROKEN, failure
            return failure
        self._state = State.IDLE
        return None

    def _receive(self) -> None:
        assert self.process is not None
        self.process.wait()
        self._state = State.BROKEN
        self._answer = self.process.receive()
        self._was_made = True
        if self._expected.pop(0) == "reset":
            self._first_answer = self._answer
        self._state = State.WAITING

    # ------------------------------------------------------------------ the process

    def start(self) -> None:
        """Start the first process."""
        self._start_process()
        self._state = State.IDLE

    def _start_process(self) -> None:
        self.process = LaneProcess(f"env-lane-{self.number}", self._env_fn, self._was_made, self._settings)
        self.process.start()

    def _restart(self, failure: LaneFailure) -> None:
        """Start another process, and let it come to where the lane's next answer is expected."""
        if self.process is not None:
            # An env that raised an exception ends its process
            self.process.end(PROCESS_END_TIMEOUT if failure.error else 0.0)
        self._count_restart(failure)
        self._restart_reason = failure.reason
        warnings.warn(f"Env lane {self.number} was restarted: {failure.reason}.", stacklevel=2)
        requests = self._list_requests_after_restart()
        messages = [ForkingPickler.dumps(request) for request in requests]
        self._start_process()
        self._transmit([command for command, _ in requests], messages)

    def _list_requests_after_restart(self) -> list[Request]:
        """Attributes, a reset, and what the last request was for, unless the reset is the answer to it."""
        command, argument = self._request
        requests: list[Request] = [("set_attr", attribute) for attribute in self._attributes.items()]
        if command == "reset":
            return [*requests, ("reset", (self._make_seed(), *argument[1:]))]
        requests.append(("reset", (self._make_seed(), {})))
        return requests if command == "step" else [*requests, self._request]

    def _make_seed(self) -> int | None:
        """Another seed for each restart, since the one before may lead to the same failure."""
        if self._seed is None:
            return None
        return int(np.random.SeedSequence((self._seed, self.n_restarts)).generate_state(1)[0])

    def _count_restart(self, failure: LaneFailure) -> None:
        """Raise an error instead if there were too many, or the env was not even made."""
        now = time.monotonic()
        self._restart_times = [t for t in self._restart_times if now - t < self._settings.restart_window]
        if self.has_stepped:
            self._n_restarts_without_step = 0
        # Restarts without a step between them count however long they took
        n_restarts = max(len(self._restart_times), self._n_restarts_without_step)
        if not self._was_made or n_restarts >= self._settings.max_restarts:
            # Whoever uses the env again wants it to be tried again
            self._restart_times, self._n_restarts_without_step = [], 0
            self._raise(failure)
        self._restart_times.append(now)
        self._n_restarts_without_step += 1
        self.has_stepped = False
        self.n_restarts += 1

    def _raise(self, failure: LaneFailure) -> NoReturn:
        """Raise the exception of the env, or an error that says what happened."""
        settings = self._settings
        restarts = "Its env was to be made for the first time"
        if self._was_made:
            restarts = (
                f"It was restarted as often as max_restarts={settings.max_restarts} allows within "
                f"restart_window={settings.restart_window:g} s"
            )
        if failure.error is None:
            raise RuntimeError(
                f"Env lane {self.number}: {failure.reason}. {restarts}. Repair the env (what its process printed may "
                "say why; signal 9 often means that the machine ran out of memory), allow it more seconds "
                "(step_timeout, start_timeout), or allow more restarts."
            )
        exception = failure.error.restore()
        add_note(exception, f"Raised in env lane {self.number}. {restarts}.")
        raise exception from RemoteTraceback(failure.error.traceback)

    def begin_closing(self) -> None:
        """Ask the process to close the env and to end. It has less time if it has not answered yet."""
        self._is_closed = True
        patience = {State.IDLE: self._settings.step_timeout, State.WAITING: PROCESS_END_TIMEOUT, State.BROKEN: 0.0}[
            self._state
        ]
        if self.process is not None and self._state is not State.BROKEN:
            self._state = State.BROKEN
            self.process.send([ForkingPickler.dumps(("close", None))])
        self._close_by = time.monotonic() + patience

    def end(self) -> None:
        """Wait until the process has ended, or end it."""
        if self.process is not None:
            self.process.end(max(self._close_by - time.monotonic(), 0.0))
