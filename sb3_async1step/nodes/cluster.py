"""Ray's cluster: start one on this machine, or join one, and leave nothing behind."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from sb3_async1step.nodes.ray_module import import_ray
from sb3_async1step.sb3_internals import start_ray_on_loopback
from sb3_async1step.workers.cores import count_usable_cores

# Trials of a study may run on several threads
_lock = threading.RLock()
# Ids of those that use the cluster, and the id of Ray's connection to it if it was made here
_users: set[int] = set()
_connection: str | None = None
# Environment variables that starting it has set: another cluster may need other values
_set_by_ray: set[str] = set()


def enter_cluster(user: object, n_cpus: int) -> Any:
    """
    Use the cluster that this process is connected to, the one that ``RAY_ADDRESS`` names, or a new one on this machine.

    :param user: who calls :func:`leave_cluster` in the end
    :param n_cpus: number of CPUs that a new one shall have at least
    :return: the package ``ray``
    """
    global _connection
    ray = import_ray()
    with _lock:
        if not ray.is_initialized():
            _users.clear()
            _connection = None
            with _keep_sigterm():
                if os.environ.get("RAY_ADDRESS"):
                    ray.init(log_to_driver=False, logging_level=logging.ERROR)
                else:
                    _start(n_cpus)
            _connection = ray.get_runtime_context().get_worker_id()
        _users.add(id(user))
    return ray


@contextmanager
def _keep_sigterm() -> Iterator[None]:
    """Keep the program's own handler of SIGTERM, which Ray replaces by one that ends the program."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _start(n_cpus: int) -> None:
    # By default, Ray sends usage statistics to its developers
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    has_auth_mode = "RAY_AUTH_MODE" in os.environ
    start_ray_on_loopback(
        num_cpus=max(n_cpus, count_usable_cores()),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    if not has_auth_mode:
        _set_by_ray.add("RAY_AUTH_MODE")


def leave_cluster(user: object) -> None:
    """
    Stop using the cluster. The last user ends what this process has started.

    :param user: who entered the cluster
    """
    global _connection
    ray = import_ray()
    with _lock:
        _users.discard(id(user))
        if _connection is None or _users:
            return
        # Somebody else may have connected Ray to another cluster since
        if ray.is_initialized() and ray.get_runtime_context().get_worker_id() == _connection:
            ray.shutdown()
        _connection = None
        for name in _set_by_ray:
            os.environ.pop(name, None)
        _set_by_ray.clear()


@dataclass
class Place:
    """
    Where a node's process shall run.

    :param n_cpus: number of CPUs for its workers
    :param machine: Ray's id of the machine, None for any
    """

    n_cpus: int
    machine: str | None = None

    def options(self, ray: Any) -> dict[str, Any]:
        """
        :param ray: the package ``ray``
        :return: options of the node's actor. It goes elsewhere if the machine is lost
        """
        strategy: Any = "SPREAD"
        if self.machine is not None:
            strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(self.machine, soft=True)
        return {"num_cpus": 1, "scheduling_strategy": strategy}


def list_machines(ray: Any) -> list[tuple[str, int]]:
    """
    :param ray: the package ``ray``
    :return: ids of the cluster's machines and their numbers of CPUs
    """
    machines = [(node["NodeID"], int(node["Resources"].get("CPU", 0))) for node in ray.nodes() if node["Alive"]]
    return [(machine, n_cpus) for machine, n_cpus in machines if n_cpus >= 1]


def place_lanes(
    machines: list[tuple[str, int]], num_envs: int, n_nodes: int | None, lanes_per_node: int | None
) -> list[tuple[range, Place]]:
    """
    :param machines: ids of the machines and their numbers of CPUs
    :param num_envs: number of lanes
    :param n_nodes: number of nodes, None for one on each machine
    :param lanes_per_node: number of lanes of each node, None for as many as its CPUs entitle it to
    :return: the lanes of each node, and where it shall run
    :raises ValueError: if the cluster has too few CPUs
    """
    total = sum(n_cpus for _, n_cpus in machines)
    if n_nodes is None and lanes_per_node is None and machines:
        machines = sorted(machines, key=lambda machine: -machine[1])[:num_envs]
        places = [Place(n_cpus, machine) for machine, n_cpus in machines]
        return list(zip(_share(num_envs, [n_cpus for _, n_cpus in machines]), places, strict=True))
    if lanes_per_node is not None:
        firsts = range(0, num_envs, lanes_per_node)
        groups = [range(first, min(first + lanes_per_node, num_envs)) for first in firsts]
    else:
        groups = _share(num_envs, [1] * (n_nodes or 1))
    if len(groups) > total:
        raise ValueError(
            f"{len(groups)} node(s) need one CPU each, but Ray's cluster has {total}: take fewer nodes (n_nodes), or "
            "start Ray on more machines before."
        )
    return [(lanes, Place(max(1, total // len(groups)))) for lanes in groups]


def _share(num_envs: int, weights: list[int]) -> list[range]:
    """Consecutive lanes for each node, at least one, and otherwise in proportion to the weights."""
    sizes = [1] * len(weights)
    for _ in range(num_envs - len(weights)):
        poorest = min(range(len(weights)), key=lambda i: sizes[i] / weights[i])
        sizes[poorest] += 1
    bounds = [0, *accumulate(sizes)]
    return [range(first, last) for first, last in pairwise(bounds)]
