"""How a node exchanges what it has learned for what all nodes have learned."""

import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import unwrap_vec_normalize

from sb3_async1step.nodes.messages import Learned, Pull, Push, Report
from sb3_async1step.nodes.moments import Moments, read_moments, store_moments
from sb3_async1step.nodes.parameters import read_buffers, read_values, store_buffers, store_values
from sb3_async1step.nodes.ray_module import import_ray, lost_errors

#: Seconds after which a node asks again, if the server is away or has nothing to do for it
RETRY_INTERVAL = 0.05


class Exchange(ABC):
    """
    Pushes what the node has learned since it pulled the parameters last, and pulls what all nodes have learned.

    :param server: the server's actor
    :param node: number of the node
    :param epoch: how often it was restarted
    :param model: the node's model, which has not begun to learn
    """

    def __init__(self, server: Any, node: int, epoch: int, model: Any) -> None:
        #: Whether the driver waits for the node's end
        self.is_stopped = False
        self._server, self._model = server, model
        self._node, self._epoch = node, epoch
        self._number = 0
        self._version = 0
        # The parameters that the node went on with
        self._pulled: np.ndarray | None = None
        self._seconds = 0.0
        self._normalize = unwrap_vec_normalize(model.env)
        self._moments: dict[str, Moments] = {}
        self._pool: Any = None
        self._shared: Any = None

    @abstractmethod
    def take_learned(self) -> Learned | None:
        """
        :return: what the node has learned since it pulled the parameters last; None if it has not pulled any yet, or
            there are no gradients since
        """

    def begin(self) -> bool:
        """
        Find the workers, which have been made by now.

        :return: whether this was the first call
        """
        is_first = self._pool is None
        self._pool, self._shared = self._model.get_workers()
        if is_first:
            # The driver's statistics have those of the reset already
            self._moments = read_moments(self._normalize)
        return is_first

    def stop(self) -> None:
        """Let the workers end."""
        self._pool.stop()

    def exchange(self, report: Report) -> Pull | None:
        """
        :param report: the steps since the last exchange
        :return: the server's answer, which the model has taken over; None if the node was stopped before it came
        """
        pull = self._call(self._make_push(report, self.take_learned() if len(report.dones) > 0 else None))
        while pull is not None and pull.n_granted == 0 and not pull.is_over:
            # All steps have been promised to others, who may fail
            time.sleep(RETRY_INTERVAL)
            pull = self._call(self._make_push(Report(), None))
        if pull is not None:
            self._take(pull)
        return pull

    def _make_push(self, report: Report, learned: Learned | None) -> Push:
        moments = read_moments(self._normalize)
        gained = {name: value - self._moments[name] for name, value in moments.items()}
        self._moments = moments
        self._number += 1
        return Push(
            self._node, self._epoch, self._number, self._version, learned, read_buffers(self._shared), gained, report
        )

    def _call(self, push: Push) -> Pull | None:
        """Send a push again and again until a server has answered, which applies it once."""
        ray = import_ray()
        while not self.is_stopped:
            start = time.perf_counter()
            try:
                pull = ray.get(self._server.exchange.remote(push, self._seconds))
            except (*lost_errors(ray), ray.exceptions.RaySystemError, OSError):
                # The last two: what this machine keeps messages in has ended, and this process will, too
                pull = None
            if pull is not None:
                self._seconds = time.perf_counter() - start
                return pull
            time.sleep(RETRY_INTERVAL)
        return None

    def _take(self, pull: Pull) -> None:
        model, shared, pool = self._model, self._shared, self._pool
        assert pull.values is not None
        self._pulled, self._version = np.array(pull.values), pull.version
        store_values(shared.parameters, self._pulled)
        store_buffers(shared, pull.buffers)
        store_moments(self._normalize, pull.moments)
        self._moments = read_moments(self._normalize)
        model.jump(pull.num_timesteps)
        if pull.n_granted > 0:
            n_expected = pull.num_timesteps + pull.n_granted * pool.num_envs * pull.n_nodes
            shared.pace = max(0.0, (n_expected - pool.num_timesteps) / (pull.n_granted * pool.num_envs))
            pool.grant(pull.n_granted)


class DeltaExchange(Exchange):
    """Pushes by how much the node has changed the parameters since it pulled them last (see :class:`Exchange`)."""

    def take_learned(self) -> Learned | None:
        if self._pulled is None:
            return None
        return Learned(read_values(self._shared.parameters) - self._pulled)


class GradientExchange(Exchange):
    """
    Pushes the mean of the gradients that the node has computed since it pulled the parameters, which do not change
    meanwhile; the server applies it (Nair et al. 2015, "Massively Parallel Methods for Deep Reinforcement Learning").
    For the parameters, see :class:`Exchange`.
    """

    def __init__(self, server: Any, node: int, epoch: int, model: Any) -> None:
        super().__init__(server, node, epoch, model)
        self._mean = model.policy.optimizer = GradientMean(model.policy.optimizer)

    def take_learned(self) -> Learned | None:
        if self._mean.n_gradients == 0:
            return None
        learning_rate = float(self._mean.param_groups[0]["lr"])
        parameters = self._shared.parameters
        means = self._mean.take(parameters)
        values = [th.zeros_like(p) if mean is None else mean for p, mean in zip(parameters, means, strict=True)]
        return Learned(read_values(values), learning_rate, [mean is not None for mean in means])


class GradientMean(th.optim.Optimizer):
    """
    Keeps the mean of gradients in the place of the policy's optimizer, and leaves the parameters as they are.

    :param optimizer: that optimizer
    """

    def __init__(self, optimizer: th.optim.Optimizer) -> None:
        super().__init__([dict(group) for group in optimizer.param_groups], {})
        self.n_gradients = 0
        self._sums: dict[th.Tensor, th.Tensor] = {}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """
        Add the parameters' gradients to the others.

        :param closure: nobody gives one
        """
        self.n_gradients += 1
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if parameter in self._sums:
                self._sums[parameter] += parameter.grad
            else:
                self._sums[parameter] = parameter.grad.clone()

    def take(self, parameters: list[th.nn.Parameter]) -> list[th.Tensor | None]:
        """
        :param parameters: the network's
        :return: the mean of the gradients of each since the last call, None for one without any
        """
        means = [self._sums[p] / self.n_gradients if p in self._sums else None for p in parameters]
        self.n_gradients = 0
        self._sums.clear()
        return means


EXCHANGES: dict[str, type[Exchange]] = {"deltas": DeltaExchange, "gradients": GradientExchange}
