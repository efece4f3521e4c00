"""The server that holds what the nodes learn together: parameters, T and running statistics."""

from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np

from sb3_async1step.nodes.messages import Learned, News, Pull, Push, Report, ServerState
from sb3_async1step.nodes.server_optimizer import ServerOptimizer
from sb3_async1step.nodes.settings import ExchangeSettings


class ParameterServer:
    """
    Holds the parameters. Its methods are called one at a time. A new one, which Ray makes in the place of one that has
    died, knows nothing, and answers None until the driver has loaded the last checkpoint.
    """

    def __init__(self) -> None:
        self.settings = ExchangeSettings()
        self.state: ServerState | None = None
        self._optimizer: ServerOptimizer | None = None
        self._clear()

    def _clear(self) -> None:
        self._is_stopped = False
        self._reports: deque[Report] = deque()
        self._staleness: list[int] = []
        self._pull_seconds: list[float] = []
        self._n_bytes = self._n_dropped = 0

    def load(self, state: ServerState, settings: ExchangeSettings, model: tuple[Any, bytes] | None = None) -> None:
        """
        Begin a training, or go on with it.

        :param state: where
        :param settings: how the nodes exchange parameters
        :param model: class and file of the model, whose optimizer applies gradients
        """
        self._clear()
        self._optimizer = None if model is None else ServerOptimizer(*model, state.optimizer)
        self.state, self.settings = state, settings

    def stop(self) -> None:
        """Tell each node that exchanges from now on that the training is over."""
        self._is_stopped = True

    def begin_epoch(self, node: int, epoch: int) -> None:
        """
        Forget what was granted to a node that has ended, and refuse what it may still send.

        :param node: the node
        :param epoch: how often it was restarted
        """
        if self.state is not None:
            self.state.epochs[node], self.state.last_numbers[node] = epoch, -1
            self.state.granted.pop(node, None)

    def exchange(self, push: Push, seconds: float = 0.0) -> Pull | None:
        """
        Apply a push, unless it was applied before, and let the node go on.

        :param push: what the node has learned
        :param seconds: what its last exchange took
        :return: the parameters, and how many steps to take; None if this server has no state yet
        """
        state = self.state
        if state is None:
            return None
        if push.epoch < state.epochs.get(push.node, 0):
            return self._answer(push.node, 0, is_over=True)
        if push.epoch > state.epochs.get(push.node, 0):
            # The checkpoint is older than the node
            self.begin_epoch(push.node, push.epoch)
        if push.number > state.last_numbers.get(push.node, -1):
            self._apply(push)
            if seconds > 0:
                # A node's first push comes after no exchange
                self._pull_seconds.append(seconds)
            state.last_numbers[push.node] = push.number
            state.granted.pop(push.node, None)
        is_over = self._is_stopped or self._is_complete()
        if is_over:
            return self._answer(push.node, 0, is_over)
        if push.node not in state.granted:
            self._grant(push.node)
        return self._answer(push.node, state.granted.get(push.node, 0) // state.n_lanes[push.node], is_over)

    def _apply(self, push: Push) -> None:
        state = self.state
        assert state is not None
        state.num_timesteps += len(push.report.dones)
        # What Ray hands over are views: kept here, they would keep the whole message in Ray's store
        self._reports.append(replace(push.report, dones=push.report.dones.copy()))
        for name, gained in push.moments.items():
            state.moments[name] = state.moments[name] + gained
        if push.learned is None:
            return
        self._n_bytes += push.learned.change.nbytes
        staleness = max(0, state.version - push.version)
        self._staleness.append(staleness)
        if self.settings.max_staleness is not None and staleness > self.settings.max_staleness:
            self._n_dropped += 1
            return
        self._learn(push.node, push.learned)
        state.buffers = [buffer.copy() for buffer in push.buffers]
        state.version += 1

    def _learn(self, node: int, learned: Learned) -> None:
        state = self.state
        assert state is not None
        if learned.learning_rate is None:
            self._add(node, learned.change)
        else:
            assert self._optimizer is not None
            state.values = self._optimizer.step(state.values, learned)

    def _add(self, node: int, delta: np.ndarray) -> None:
        state, momentum = self.state, self.settings.outer_momentum
        assert state is not None
        if momentum > 0:
            before = np.zeros_like(delta) if state.momentum is None else state.momentum
            delta = state.momentum = momentum * before + delta
        factor = self.settings.outer_learning_rate
        if factor is None:
            # All nodes began near the same parameters: the sum of their deltas goes too far, their mean does not. Some
            # may have joined since, and others have ended
            factor = 1.0 / max(1, state.n_side_by_side.get(node, 1), len(state.granted))
        # A new array: the old one may be on its way to a node
        state.values = state.values + np.float32(factor) * delta

    def _grant(self, node: int) -> None:
        """Let a node take steps, but not more than are left when all others have taken theirs."""
        state = self.state
        assert state is not None
        n_lanes = state.n_lanes[node]
        n_promised = state.num_timesteps + sum(state.granted.values())
        n_steps = self.settings.count_steps(n_lanes)
        n_left = (state.last_timestep - n_promised) // n_lanes * n_lanes
        if n_left == 0 and n_promised < state.total_timesteps:
            # The steps of nodes with unequal numbers of lanes may not add up exactly
            n_left = n_lanes
        if n_left > 0:
            state.granted[node] = min(n_steps, n_left)
            state.n_side_by_side[node] = len(state.granted)

    def _is_complete(self) -> bool:
        """Whether all steps have been taken, but for those that no node has few enough lanes for."""
        state = self.state
        assert state is not None
        n_left = state.last_timestep - state.num_timesteps
        # Those of a node that waits for a CPU need not be taken by it
        there = [n for node, n in enumerate(state.n_lanes) if state.last_numbers.get(node, -1) >= 0]
        is_enough = state.num_timesteps >= state.total_timesteps and n_left < min(there or state.n_lanes)
        return is_enough and not state.granted

    def _answer(self, node: int, n_granted: int, is_over: bool) -> Pull:
        state = self.state
        assert state is not None
        # Nodes that wait for steps ask many times a second
        values = state.values if n_granted > 0 or is_over else None
        self._n_bytes += 0 if values is None else values.nbytes
        return Pull(
            state.version, values, state.buffers, state.moments, state.num_timesteps, n_granted,
            max(1, len(state.granted)), is_over,
        )  # fmt: skip

    def get_values(self) -> tuple[np.ndarray, list[np.ndarray]] | None:
        """
        :return: the parameters and the buffers, None if this server has no state yet
        """
        state = self.state
        return None if state is None else (state.values, state.buffers)

    def get_optimizer_state(self) -> dict[str, Any] | None:
        """
        :return: the state of the optimizer that applies gradients, None if there is none
        """
        return None if self._optimizer is None else self._optimizer.get_state()

    def take_news(self, with_state: bool) -> News | None:
        """
        :param with_state: whether to add a checkpoint
        :return: what has happened since the last call, None if this server has no state yet
        """
        state = self.state
        if state is None:
            return None
        if with_state:
            state.optimizer = self.get_optimizer_state()
        news = News(
            list(self._reports), state.num_timesteps, state.version, state.moments, self._staleness,
            self._pull_seconds, self._n_bytes, self._n_dropped, state.epochs, state.last_numbers,
            self._is_complete(), state if with_state else None,
        )  # fmt: skip
        self._reports.clear()
        self._staleness, self._pull_seconds, self._n_bytes, self._n_dropped = [], [], 0, 0
        return news
