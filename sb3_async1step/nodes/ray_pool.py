"""Runs nodes in the place of workers."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, unwrap_vec_normalize, unwrap_vec_wrapper

from sb3_async1step.nodes.exchange_metrics import ExchangeMetrics
from sb3_async1step.nodes.messages import News, Report, ServerState
from sb3_async1step.nodes.moments import Moments, read_moments, store_moments
from sb3_async1step.nodes.news_reader import NewsReader
from sb3_async1step.nodes.node import NodeRecipe
from sb3_async1step.nodes.parameters import read_buffers, read_values, store_buffers, store_values
from sb3_async1step.nodes.ray_module import import_ray, lost_errors
from sb3_async1step.nodes.ray_vec_env import NODE_END_TIMEOUT, RayNode, RayVecEnv, unwrap
from sb3_async1step.nodes.reported_steps import ReportedSteps
from sb3_async1step.nodes.wrappers import pack_wrappers
from sb3_async1step.vec_envs.split import find_base
from sb3_async1step.workers.gate import Gate
from sb3_async1step.workers.pool import Pool
from sb3_async1step.workers.shared_parameters import SharedParameters
from sb3_async1step.workers.transitions import Transitions

#: Seconds between two looks at what the nodes have done
POLL_INTERVAL = 0.05
#: The same while a callback takes its time
READ_INTERVAL = 1.0


class RayWorkerPool(Pool):
    """
    The nodes of a :class:`~sb3_async1step.RayVecEnv` and their server. Unlike workers, nodes go on while the calling
    thread processes a batch.

    :param env: the training env
    :param gate: the model's gate
    :param recipe: what each node learns with; its lanes and numbers are set here
    :param update_interval: vector steps between two updates of a node's worker
    :param longest_sync_interval: most steps of all nodes that should lie between two exchanges
    :param shared: the model's parameters
    :param on_jump: called with T before and after the model's parameters were replaced
    """

    def __init__(
        self,
        env: VecEnv,
        gate: Gate,
        recipe: NodeRecipe,
        update_interval: int,
        longest_sync_interval: float,
        shared: SharedParameters,
        on_jump: Callable[[int, int], None],
    ) -> None:
        base = find_base(env)
        assert isinstance(base, RayVecEnv)
        self._ray = import_ray()
        # Also if the server hangs
        self._lost_errors = (*lost_errors(self._ray), self._ray.exceptions.GetTimeoutError)
        self._gate = gate
        self.num_envs = env.num_envs
        self.workers = []
        n_lanes = [len(node.lanes) for node in base.nodes]
        self.settings = base.settings.with_sync_interval(update_interval, n_lanes, longest_sync_interval)
        self._base, self._recipe, self._shared, self._on_jump = base, recipe, shared, on_jump
        self._wrappers = [pack_wrappers(env, node.lanes) for node in base.nodes]
        self._monitor = unwrap_vec_wrapper(env, VecMonitor)
        self._normalize = unwrap_vec_normalize(env)
        self._steps = ReportedSteps()
        # T that the server had when it was last asked, and when the model's parameters were last replaced
        self._num_timesteps = self._num_timesteps_when_pulled = recipe.num_timesteps
        # Versions of the parameters: the server's newest, the one of this callback, and the model's
        self._version = self._shown_version = self._pulled_version = 0
        # Running statistics that have come during this callback
        self._moments: dict[str, Moments] = {}
        self._pull_time = time.monotonic()
        self._is_stopped = False
        self._is_complete = False
        # By the nodes' numbers: their learn(), what they answer as soon as their processes have started, the numbers of
        # their last pushes, and when these came
        self._learning: dict[int, Any] = {}
        self._starting: dict[int, Any] = {}
        self._last_numbers: dict[int, int] = {}
        self._last_exchanges: dict[int, float] = {}
        # Those that have ended since the server told them that the training is over
        self._ended: set[int] = set()
        # The first one that ends the training. A callback whose question has met it may have caught it
        self._exception: BaseException | None = None
        self._n_restarts = self._n_server_restarts = 0
        self._metrics = ExchangeMetrics()
        self._checkpoint = self._make_state()
        self._checkpoint_time = time.monotonic()
        self._reader = NewsReader(self._ask_for_news, min(READ_INTERVAL, self.settings.checkpoint_interval / 2))
        self._server = base.server
        # Since when it has not answered, None if it does
        self._server_lost_at: float | None = None
        # If the server is away, it is given the checkpoint when it is back
        with suppress(*self._lost_errors):
            self._load_server()

    @property
    def observations(self) -> None:
        """The nodes keep them."""
        return None

    @property
    def reset_infos(self) -> list[dict[str, Any]]:
        """What the envs said when the driver reset them."""
        return self._base.reset_infos

    def settle(self) -> None:
        """Nodes answer when their workers stand still."""

    def check_change(self, name: str) -> None:
        """
        :param name: what somebody wants to change while the nodes learn
        :raises RuntimeError: unless they have ended
        """
        if self._is_stopped:
            return
        raise RuntimeError(
            f"{name} can't be changed while the nodes of a RayVecEnv learn: end the training (by a callback that "
            "returns False), change it, and call learn(reset_num_timesteps=False)."
        )

    def describe(self) -> str:
        """
        :return: which nodes there are
        """
        numbers = ", ".join(str(len(node.lanes)) for node in self._base.nodes)
        return f"Learning on {len(self._base.nodes)} node(s) with {numbers} of {self.num_envs} env lane(s)"

    # ------------------------------------------------------------------ starting

    def _make_state(self) -> ServerState:
        recipe = self._recipe
        n_vector_steps = -(-(recipe.total_timesteps - recipe.num_timesteps) // self.num_envs)
        return ServerState(
            read_values(self._shared.parameters),
            read_buffers(self._shared),
            read_moments(self._normalize),
            [len(node.lanes) for node in self._base.nodes],
            recipe.num_timesteps,
            recipe.total_timesteps,
            recipe.num_timesteps + n_vector_steps * self.num_envs,
            epochs={number: node.epoch for number, node in enumerate(self._base.nodes)},
        )

    def _load_server(self) -> None:
        # Only gradients need the policy's optimizer
        model = (self._recipe.model_class, self._recipe.model) if self.settings.exchange == "gradients" else None
        self._ask(self._server.load.remote(self._checkpoint, self.settings, model))

    def _ask(self, request: Any) -> Any:
        """The server's answer."""
        return self._ray.get(request, timeout=self.settings.node_timeout)

    def _start_node(self, number: int) -> None:
        node = self._base.nodes[number]
        # A node that joins later begins with the parameters and the T of the start, too: when it pulls the current
        # ones, it makes up for all updates of the target network
        recipe = replace(
            self._recipe,
            exchange=self.settings.exchange,
            wrappers=self._wrappers[number],
            lanes=node.lanes,
            n_cpus=node.place.n_cpus,
            seed=derive_seed(self._recipe.seed, self._recipe.num_timesteps, number, node.epoch),
            node=number,
            epoch=node.epoch,
        )
        self._last_exchanges.pop(number, None)
        self._starting[number] = node.actor.__ray_ready__.remote()
        self._learning[number] = node.actor.learn.remote(recipe, self._server)

    # ------------------------------------------------------------------ following the nodes

    def batches(self) -> Iterator[Transitions]:
        """
        Run the nodes.

        :return: batches of ``num_envs`` steps; the last one may be smaller
        :raises BaseException: the first exception that a node raised
        """
        for number in range(len(self._base.nodes)):
            self._start_node(number)
        self._reader.start()
        self._base.recover_node = self.recover_node
        # A node that waits for a CPU need not learn when others have taken all steps
        while (self._learning or self._ended) and not self._is_complete:
            self._follow_nodes()
            self._show_news()
            while len(self._steps) >= self.num_envs:
                yield self._steps.take(self.num_envs)
                self._show_news()
        while len(self._steps) > 0:
            yield self._steps.take(self.num_envs)

    def _follow_nodes(self) -> None:
        self.check()
        self._handle_ended_nodes()
        # What nodes have done while a callback took its time is known before they are judged
        if self._take_news():
            self._restart_hanging_nodes()
            self._begin_again()

    def _show_news(self) -> None:
        """Between two callbacks: during one, the parameters and running statistics stay the same."""
        self._shown_version = self._version
        if self._moments:
            # Other threads may be about to look at them
            with self._gate.passed():
                self._store_moments()

    def _store_moments(self) -> None:
        if self._moments:
            store_moments(self._normalize, self._moments)
            self._moments = {}

    def recover_node(self, node: RayNode) -> None:
        """
        Replace a node if it has ended or hangs, and any other, too. A callback asks for it: what it may see of the
        model stays as it is.

        :param node: that which a callback waits for
        """
        self._follow_nodes()
        if self._base.nodes.index(node) not in self._learning and not node.is_alive():
            # It has taken its last step; others go on
            node.restart()

    def _handle_ended_nodes(self) -> None:
        """Wait for a moment, and see to nodes that have ended."""
        requests = list(self._learning.values())
        if not requests:
            time.sleep(POLL_INTERVAL)
            return
        ended, _ = self._ray.wait(requests, timeout=POLL_INTERVAL)
        for number, request in list(self._learning.items()):
            if request in ended:
                self._handle_end(number, request)

    def _restart_hanging_nodes(self) -> None:
        for number in list(self._learning):
            if self._hangs(number):
                n_steps = self.settings.count_steps(len(self._base.nodes[number].lanes))
                self._restart_node(
                    number,
                    f"has not exchanged parameters for node_timeout={self.settings.node_timeout:g} seconds, the most "
                    f"that its {n_steps} steps between two exchanges (sync_interval) may take",
                )

    def _handle_end(self, number: int, request: Any) -> None:
        del self._learning[number]
        try:
            exception = self._find_exception(request)
        except self._lost_errors as error:
            self._restart_node(number, f"has ended ({str(error).splitlines()[0]})")
            return
        if exception is not None:
            self._fail(exception)
        self._ended.add(number)

    def _fail(self, exception: BaseException) -> NoReturn:
        self._exception = exception
        raise exception

    def _begin_again(self) -> None:
        """
        Let those learn that have ended although there are steps to take: the server that told them that the training is
        over has died before the driver knew of it, with their last steps.
        """
        while self._ended and not self._is_complete:
            number = self._ended.pop()
            self._base.nodes[number].epoch += 1
            self._announce(number)

    def _hangs(self, number: int) -> bool:
        timeout = self.settings.node_timeout
        if timeout is None:
            return False
        now = time.monotonic()
        if number not in self._last_exchanges and self._has_started(number):
            # Its process has started, which may take as long as it takes the cluster to have a CPU for it
            self._last_exchanges[number] = now
        return now - self._last_exchanges.get(number, now) > timeout

    def _has_started(self, number: int) -> bool:
        return number in self._last_exchanges or self._has_ended(self._starting[number])

    def _restart_node(self, number: int, reason: str) -> None:
        if self._n_restarts == self.settings.max_restarts:
            self._fail(
                RuntimeError(f"Node {number} {reason}, after max_restarts={self._n_restarts} restarts of nodes.")
            )
        self._n_restarts += 1
        self._base.nodes[number].restart()
        self._announce(number)

    def _announce(self, number: int) -> None:
        """Let a node learn in a new epoch."""
        # A server that begins anew may not hear of it
        self._last_numbers[number] = -1
        with suppress(*self._lost_errors):
            self._ask(self._server.begin_epoch.remote(number, self._base.nodes[number].epoch))
        self._start_node(number)

    # ------------------------------------------------------------------ the server

    def _take_news(self) -> bool:
        """Whether the server had any."""
        asked_at = time.monotonic()
        try:
            for news in self._reader.take():
                if news is None:
                    self._reload()
                    return False
                self._count(news)
        except self._lost_errors as error:
            # It starts again
            self._check_server(asked_at, error)
            time.sleep(POLL_INTERVAL)
            return False
        self._server_lost_at = None
        return True

    def _ask_for_news(self) -> News | None:
        now = time.monotonic()
        with_state = now - self._checkpoint_time > self.settings.checkpoint_interval
        news = self._ask(self._server.take_news.remote(with_state))
        if news is not None and news.state is not None:
            self._checkpoint, self._checkpoint_time = news.state, now
        return news

    def _check_server(self, asked_at: float, error: Exception) -> None:
        self._server_lost_at = asked_at if self._server_lost_at is None else self._server_lost_at
        timeout = self.settings.node_timeout
        if timeout is not None and time.monotonic() - self._server_lost_at > timeout:
            raise RuntimeError(
                f"The server of the nodes has been away for node_timeout={timeout:g} seconds."
            ) from error

    def _count(self, news: News) -> None:
        for report in news.reports:
            self._steps.add(report)
            self._write_episodes(report)
        self._num_timesteps, self._version = news.num_timesteps, news.version
        self._is_complete = news.is_complete
        self._moments = news.moments
        self._metrics.add(news)
        for number, last in news.last_numbers.items():
            # News may be older than the node's process
            is_of_this_epoch = news.epochs.get(number, 0) == self._base.nodes[number].epoch
            if is_of_this_epoch and last not in (-1, self._last_numbers.get(number)):
                self._last_numbers[number] = last
                self._last_exchanges[number] = time.monotonic()

    def _reload(self) -> None:
        """Give a server that was started again the last checkpoint. T is what the nodes have reported since then."""
        self._n_server_restarts += 1
        state = self._checkpoint
        nodes = self._base.nodes
        state.num_timesteps = self._num_timesteps
        state.version = self._version = self._version + 1
        state.epochs = {number: node.epoch for number, node in enumerate(nodes)}
        # What was counted must not be counted again
        state.last_numbers = dict(self._last_numbers)
        n_left = state.last_timestep - state.num_timesteps
        # Nobody knows what was granted since, but no node has got more. One that waits for a CPU has got nothing
        there = [number for number in self._learning if self._has_started(number)]
        state.granted = {number: min(n_left, self.settings.count_steps(len(nodes[number].lanes))) for number in there}
        state.n_side_by_side = dict.fromkeys(there, len(there))
        # They could not exchange while it was away
        self._last_exchanges.update(dict.fromkeys(there, time.monotonic()))
        self._load_server()

    def _write_episodes(self, report: Report) -> None:
        if self._monitor is None:
            return
        episodes = [info["episode"] for info in report.infos if "episode" in info]
        self._monitor.episode_count += len(episodes)
        if self._monitor.results_writer is not None:
            for episode in episodes:
                self._monitor.results_writer.write_row(episode)

    def refresh(self) -> None:
        """
        Give the model the server's parameters, if nodes have reported anything since it got them last. They are the
        same during a whole callback. If the server is away, the model keeps its own.
        """
        if self._shown_version != self._pulled_version and not self._is_stopped:
            self._pull()

    def _pull(self) -> bool:
        """Whether the server was there, whose parameters the model has now."""
        # It may rise while the server answers
        version = self._shown_version
        try:
            answer = self._ask(self._server.get_values.remote())
        except self._lost_errors:
            answer = None
        if answer is None:
            return False
        values, buffers = answer
        self._store(values, buffers, version)
        return True

    def _store(self, values: np.ndarray, buffers: list[np.ndarray], version: int) -> None:
        self._pulled_version, self._pull_time = version, time.monotonic()
        store_values(self._shared.parameters, values)
        store_buffers(self._shared, buffers)
        self._on_jump(self._num_timesteps_when_pulled, self._num_timesteps)
        self._num_timesteps_when_pulled = self._num_timesteps

    def stop(self) -> None:
        """Let all nodes end, and restart those that do not; the model gets the parameters of the end."""
        if self._is_stopped:
            return
        self._reader.end(NODE_END_TIMEOUT)
        self._base.recover_node = None
        # Those that have not begun yet
        self._server.stop.remote()
        for number in self._learning:
            self._base.nodes[number].actor.stop.remote()
        if self._learning:
            self._ray.wait(list(self._learning.values()), num_returns=len(self._learning), timeout=NODE_END_TIMEOUT)
        # Other threads may be about to look at the model
        with self._gate.passed():
            if not self._pull():
                self._take_checkpoint()
            if self._normalize is not None:
                self._take_moments()
            if self.settings.exchange == "gradients":
                self._take_optimizer()
        self._is_stopped = True
        for number, request in list(self._learning.items()):
            if self._has_ended(request):
                # Its process may have ended, too
                with suppress(*self._lost_errors):
                    self._exception = self._exception or self._find_exception(request)
            else:
                self._base.nodes[number].restart()
        self._learning.clear()

    def check(self) -> None:
        if self._exception is not None:
            raise self._exception

    def _find_exception(self, request: Any) -> BaseException | None:
        """The exception of a node whose ``learn()`` has ended, None if there was none."""
        try:
            return self._ray.get(request)
        except self._lost_errors:
            raise
        except self._ray.exceptions.RayTaskError as error:
            exception = unwrap(error)
            exception.__cause__ = error
            return exception

    def _take_checkpoint(self) -> None:
        """The server is away when the training ends: the model gets the last that is known of its parameters."""
        warnings.warn(
            "The server of the nodes was away when the training ended: the model has its parameters of at most "
            f"checkpoint_interval={self.settings.checkpoint_interval:g} seconds before.",
            stacklevel=2,
        )
        if self._checkpoint_time > self._pull_time:
            self._store(self._checkpoint.values, self._checkpoint.buffers, self._version)

    def _take_moments(self) -> None:
        """The statistics that belong to the server's newest parameters."""
        with suppress(*self._lost_errors):
            for news in self._reader.take():
                if news is not None:
                    self._moments = news.moments
        self._store_moments()

    def _take_optimizer(self) -> None:
        """Give the model's optimizer the state of the server's, or if the server is away, that of the checkpoint."""
        state = None
        with suppress(*self._lost_errors):
            state = self._ask(self._server.get_optimizer_state.remote())
        state = state or self._checkpoint.optimizer
        if state is not None:
            self._shared.policy.optimizer.load_state_dict(state)

    def _has_ended(self, request: Any) -> bool:
        ended, _ = self._ray.wait([request], timeout=0)
        return bool(ended)

    def take_metrics(self) -> dict[str, float]:
        """
        :return: what the logger shall record of the nodes and the server, since the last call
        """
        return {
            "ray/nodes": sum(map(self._has_started, self._learning)),
            "ray/node_restarts": self._n_restarts,
            "ray/server_restarts": self._n_server_restarts,
            **self._metrics.take(),
        }


def derive_seed(*numbers: int) -> int:
    """
    :param numbers: what the seed shall depend on
    :return: a seed
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] % 2**31)
