"""A VecEnv whose lanes are on the machines of a Ray cluster, where the model learns from them."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_async1step.nodes.cluster import Place, enter_cluster, leave_cluster, list_machines, place_lanes
from sb3_async1step.nodes.node import Node
from sb3_async1step.nodes.ray_module import import_ray, lost_errors
from sb3_async1step.nodes.server import ParameterServer
from sb3_async1step.nodes.settings import ExchangeSettings
from sb3_async1step.parameter_checks import check_positive, check_whole
from sb3_async1step.vec_envs.observations import concatenate
from sb3_async1step.vec_envs.split import split_vec_env
from sb3_async1step.workers.gate import learning_on
from sb3_async1step.workers.lanes import join_results

#: Threads of a node's actor: one learns, others answer what callbacks ask the lanes
N_THREADS = 4
#: Seconds that a node has to close its envs
NODE_END_TIMEOUT = 5.0
#: Seconds after which it is checked whether a node that a callback has asked still lives
ANSWER_TIMEOUT = 1.0
#: Seconds that a node has to kill the processes of its lanes
KILL_TIMEOUT = 1.0


class RayNode:
    """
    A node, seen from the driver.

    :param lanes: its lanes
    :param env_fns: functions that make their envs
    :param vec_env_cls: class of the VecEnv that holds them
    :param place: where its process shall run
    """

    def __init__(
        self, lanes: range, env_fns: Sequence[Callable[[], gym.Env]], vec_env_cls: type[VecEnv], place: Place
    ) -> None:
        self.lanes = lanes
        self.place = place
        self.epoch = 0
        self._arguments = list(env_fns), vec_env_cls
        self.start()

    def start(self) -> None:
        """Start a process. If the cluster has no free CPU for it, it starts as soon as there is one."""
        ray = import_ray()
        options = {"max_concurrency": N_THREADS, **self.place.options(ray)}
        self.actor = ray.remote(Node).options(**options).remote(*self._arguments, is_first=self.epoch == 0)

    def restart(self) -> None:
        """Start another process in the place of one that ended, or does not answer."""
        self.end()
        self.epoch += 1
        self.start()

    def end(self) -> None:
        """Kill the process and those of its lanes, if they are still there."""
        ray = import_ray()
        ray.wait([self.actor.kill_lanes.remote()], timeout=KILL_TIMEOUT)
        ray.kill(self.actor)

    def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """
        :param method: name of a method of the node's VecEnv
        :param args: its positional arguments
        :param kwargs: its keyword arguments
        :return: a reference to what it returns
        """
        return self.actor.call.remote(method, *args, **kwargs)

    def is_alive(self) -> bool:
        """
        :return: whether the process has not ended
        """
        ray = import_ray()
        try:
            ray.get(self.actor.__ray_ready__.remote(), timeout=NODE_END_TIMEOUT)
        except ray.exceptions.GetTimeoutError:
            return True
        except lost_errors(ray):
            return False
        return True


class RayVecEnv(VecEnv):
    """
    Lanes on one or more machines of a `Ray <https://docs.ray.io>`_ cluster, in one process for each *node*.
    :meth:`learn` of our algorithms runs inside of each node, with its own threads; only parameters travel between the
    nodes. ::

        make_vec_env("CartPole-v1", n_envs=32, vec_env_cls=RayVecEnv, vec_env_kwargs=dict(n_nodes=2))

    With ``RAY_ADDRESS`` set, it joins that cluster; otherwise, it starts Ray on this machine, reachable from this
    machine only, until :meth:`close`.

    :param env_fns: functions that make the envs
    :param n_nodes: number of nodes, by default one on each machine of the cluster, with lanes by its CPUs
    :param lanes_per_node: number of lanes of each node, in the place of ``n_nodes``
    :param vec_env_cls: class of the VecEnv that holds a node's lanes: ``DummyVecEnv``, ``SubprocVecEnv``,
        :class:`~sb3_async1step.HealingVecEnv`
    :param exchange: how nodes exchange what they have learned: with ``"deltas"``, each node pushes by how much it has
        changed the parameters since its last pull, and the server adds that to its own; with ``"gradients"``, nodes
        push gradients, and the server applies them with the policy's optimizer (Nair et al. 2015,
        https://arxiv.org/abs/1507.04296)
    :param sync_interval: steps of a node between two exchanges, rounded up to a step of all of its lanes. By default
        500, or fewer if there is a target network: the model's ``target_update_interval / tau`` divided by the number
        of nodes, but no fewer than an update of the largest node's workers takes. With gradients, each node exchanges
        after an update of its workers
    :param outer_learning_rate: factor of the deltas, by default 1 divided by the number of nodes that learn
    :param outer_momentum: momentum of the deltas
    :param max_staleness: number of pushes of others between a node's pull and its push, beyond which the push is
        dropped; None for no limit
    :param checkpoint_interval: seconds between two copies of the server's parameters that the driver keeps
    :param max_restarts: number of restarts of nodes in one ``learn()`` that do not end it
    :param node_timeout: seconds without an exchange after which a node is considered to hang and is restarted, None
        for no limit
    :param start_timeout: seconds until all nodes have made their envs, and in which they reset them
    :raises ValueError: if a parameter is out of range, or the cluster has too few CPUs
    :raises ImportError: if Ray is not installed
    """

    #: While nodes learn: replaces one that has ended or hangs
    recover_node: Callable[[RayNode], None] | None = None

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        n_nodes: int | None = None,
        lanes_per_node: int | None = None,
        vec_env_cls: type[VecEnv] = DummyVecEnv,
        exchange: str = "deltas",
        sync_interval: int | None = None,
        outer_learning_rate: float | None = None,
        outer_momentum: float = 0.0,
        max_staleness: int | None = None,
        checkpoint_interval: float = 10.0,
        max_restarts: int = 10,
        node_timeout: float | None = 300.0,
        start_timeout: float = 300.0,
    ) -> None:
        self.settings = ExchangeSettings(
            exchange, sync_interval, outer_learning_rate, outer_momentum, max_staleness, checkpoint_interval,
            max_restarts, node_timeout,
        )  # fmt: skip
        check_layout(len(env_fns), n_nodes, lanes_per_node)
        check_positive(start_timeout=start_timeout)
        self._start_timeout = start_timeout
        # Nothing to close so far
        self.closed = True
        self.nodes: list[RayNode] = []
        n_expected = n_nodes or (-(-len(env_fns) // lanes_per_node) if lanes_per_node else 1)
        ray = enter_cluster(self, n_expected)
        self.closed = False
        try:
            for lanes, place in place_lanes(list_machines(ray), len(env_fns), n_nodes, lanes_per_node):
                make = [env_fns[lane] for lane in lanes]
                self.nodes.append(RayNode(lanes, make, vec_env_cls, place))
            self.server = start_server(ray)
            spaces = self._get_in_time("made", self._ask_for_spaces())
            self._requests: list[Any] = []
            super().__init__(len(env_fns), *spaces[0])
        except BaseException:
            self.close()
            raise

    def _ask_for_spaces(self) -> list[Any]:
        return [node.actor.get_spaces.remote() for node in self.nodes]

    def _get_in_time(self, what: str, requests: list[Any]) -> list[Any]:
        """Answers of nodes that have made or reset their envs."""
        ray, timeout = import_ray(), self._start_timeout
        try:
            return ray.get(requests, timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            raise RuntimeError(
                f"{len(self.nodes)} nodes have not {what} their envs within start_timeout={timeout:g} seconds. Each "
                f"needs a free CPU of Ray's cluster, of whose {ray.cluster_resources().get('CPU', 0):g} CPUs "
                f"{ray.available_resources().get('CPU', 0):g} are free."
            ) from None

    def __reduce__(self) -> NoReturn:
        raise TypeError("The nodes of a RayVecEnv can't be copied: to copy a model that has one, save and load it.")

    def _check_open(self) -> None:
        # Ray would start another cluster
        if self.closed:
            raise RuntimeError("The RayVecEnv is closed: make it anew and give it to the model by set_env().")

    # ------------------------------------------------------------------ as any VecEnv

    def _get(self, requests: list[Any], what: str | None = None) -> list[Any]:
        self._check_open()
        ray = import_ray()
        try:
            return ray.get(requests) if what is None else self._get_in_time(what, requests)
        except ray.exceptions.RayTaskError as error:
            raise unwrap(error) from error
        except lost_errors(ray) as error:
            self.restart_dead_nodes()
            raise RuntimeError(
                "A node's process has ended, and another one has taken its place: reset the env."
            ) from error

    def _ask_nodes(self, questions: Sequence[tuple[RayNode, Callable[[], Any]]]) -> list[Any]:
        """
        Ask nodes at the same time. If they learn, one that is replaced meanwhile is asked again.

        :param questions: nodes, and functions that ask them and return references to their answers
        :return: the answers
        """
        if self.recover_node is None:
            # One in whose place another was started may wait for a CPU
            self._get(self._ask_for_spaces(), "made")
            return self._get([ask() for _, ask in questions])
        requests = [ask() for _, ask in questions]
        return [self._get_from(*question, request) for question, request in zip(questions, requests, strict=True)]

    def _get_from(self, node: RayNode, ask: Callable[[], Any], request: Any) -> Any:
        """The answer of a node that learns."""
        ray = import_ray()
        while True:
            try:
                return ray.get(request, timeout=ANSWER_TIMEOUT)
            except ray.exceptions.RayTaskError as error:
                raise unwrap(error) from error
            except ray.exceptions.GetTimeoutError:
                # It may take its time, or hang
                self._recover_node(node)
            except lost_errors(ray) as error:
                if not self._recover_node(node):
                    raise RuntimeError("A node's process has ended, and will be replaced: ask again.") from error
                request = ask()

    def _recover_node(self, node: RayNode) -> bool:
        """Whether this is the thread that follows the nodes. It has replaced those that have ended or hang."""
        if self.recover_node is None or not learning_on(self).is_by_this_thread():
            return False
        self.recover_node(node)
        return True

    def restart_dead_nodes(self) -> list[RayNode]:
        """
        Start other processes in the place of those that have ended.

        :return: the nodes that had ended
        :raises RuntimeError: if the env is closed
        """
        self._check_open()
        dead = [node for node in self.nodes if not node.is_alive()]
        for node in dead:
            node.restart()
        return dead

    def reset(self) -> VecEnvObs:
        """
        :return: the first observations
        """
        requests = []
        for node in self.nodes:
            lanes = slice(node.lanes.start, node.lanes.stop)
            requests.append(node.actor.reset.remote(self._seeds[lanes], self._options[lanes]))
        observations, infos = zip(*self._get(requests, "reset"), strict=True)
        self.reset_infos = [info for part in infos for info in part]
        self._reset_seeds()
        self._reset_options()
        return concatenate(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """
        :param actions: of each lane
        """
        parts = [actions[node.lanes.start : node.lanes.stop] for node in self.nodes]
        self._requests = [node.ask("step", part) for node, part in zip(self.nodes, parts, strict=True)]

    def step_wait(self) -> VecEnvStepReturn:
        """
        :return: observations, rewards, dones and infos
        """
        requests, self._requests = self._requests, []
        return join_results(self._get(requests))

    def _find_lanes(self, indices: VecEnvIndices) -> list[int]:
        # Negative ones are counted from the end, as SB3's VecEnvs do
        return [range(self.num_envs)[index] for index in self._get_indices(indices)]

    def _ask_lanes(self, method: str, *args: Any, indices: VecEnvIndices, **kwargs: Any) -> list[Any]:
        """Call a method that answers for some lanes, and put the answers into the order of the indices."""
        wanted = self._find_lanes(indices)
        questions, order = [], []
        for node in self.nodes:
            lanes = [lane for lane in wanted if lane in node.lanes]
            if lanes:
                order += lanes
                own = [lane - node.lanes.start for lane in lanes]
                questions.append((node, partial(node.ask, method, *args, indices=own, **kwargs)))
        answers = [answer for part in self._ask_nodes(questions) for answer in part]
        by_lane = dict(zip(order, answers, strict=True))
        return [by_lane[lane] for lane in wanted]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        :param attr_name: name of an attribute
        :param indices: lanes, by default all
        :return: its values, which have to be picklable
        """
        return self._ask_lanes("get_attr", attr_name, indices=indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        :param attr_name: name of an attribute
        :param value: its new value
        :param indices: lanes, by default all
        """
        wanted = self._find_lanes(indices)
        questions = []
        for node in self.nodes:
            own = [lane - node.lanes.start for lane in wanted if lane in node.lanes]
            if own:
                questions.append((node, partial(node.ask, "set_attr", attr_name, value, own)))
        self._ask_nodes(questions)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """
        :param method_name: name of a method of the envs
        :param args: its arguments
        :param indices: lanes, by default all
        :param kwargs: its keyword arguments
        :return: what it returns
        """
        return self._ask_lanes("env_method", method_name, *args, indices=indices, **kwargs)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """
        :param wrapper_class: class of a wrapper
        :param indices: lanes, by default all
        :return: whether each env has it
        """
        return self._ask_lanes("env_is_wrapped", wrapper_class, indices=indices)

    def get_images(self) -> Sequence[np.ndarray | None]:
        """
        :return: a picture of each lane
        """
        parts = self._ask_nodes([(node, partial(node.ask, "get_images")) for node in self.nodes])
        return [image for part in parts for image in part]

    def close(self) -> None:
        """Close the envs, and end the nodes, and Ray if this program has started it."""
        if self.closed:
            return
        self.closed = True
        ray = import_ray()
        try:
            if ray.is_initialized() and "server" in self.__dict__:
                self._end_nodes(ray)
        finally:
            # Also after Ctrl-C
            self.nodes = []
            leave_cluster(self)

    def _end_nodes(self, ray: Any) -> None:
        try:
            requests = [node.ask("close") for node in self.nodes]
            ray.wait(requests, num_returns=len(requests), timeout=NODE_END_TIMEOUT)
        finally:
            for node in self.nodes:
                node.end()
            ray.kill(self.server)

    def __del__(self) -> None:
        # Whoever forgets to close it leaves no processes behind. Ray itself ends them if the program ends
        if not self.__dict__.get("closed", True) and not sys.is_finalizing():
            self.close()


def start_server(ray: Any) -> Any:
    """
    :param ray: the package ``ray``
    :return: the actor of a server, on the driver's machine if that has room for it
    """
    machine = ray.get_runtime_context().get_node_id()
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(machine, soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": strategy}
    return ray.remote(ParameterServer).options(**options).remote()


def check_layout(num_envs: int, n_nodes: int | None, lanes_per_node: int | None) -> None:
    """
    :param num_envs: number of lanes
    :param n_nodes: number of nodes, or None
    :param lanes_per_node: number of lanes of each node, or None
    :raises ValueError: if there are no lanes, both are given, or one is out of range
    """
    if num_envs == 0:
        raise ValueError("RayVecEnv needs at least one env.")
    check_whole(or_none=True, n_nodes=n_nodes, lanes_per_node=lanes_per_node)
    if n_nodes is not None and lanes_per_node is not None:
        raise ValueError("n_nodes and lanes_per_node say the same: give one of them.")
    if n_nodes is not None and n_nodes > num_envs:
        raise ValueError(f"n_nodes={n_nodes}, but there are only {num_envs} lanes.")


def unwrap(error: Exception) -> BaseException:
    """
    :param error: an exception of Ray's
    :return: the exception of the other process that it stands for, if there is one
    """
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


@split_vec_env.register
def _(env: RayVecEnv, groups: Sequence[range]) -> list[VecEnv]:
    raise TypeError("The lanes of a RayVecEnv are in other processes, whose workers learn there.")
