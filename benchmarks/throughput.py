"""
Agent steps per second while learning. On Pong with the Nature CNN: compared with SB3's DQN and A2C and with PQN, for
several numbers of workers and lanes, and compared with the floor, the time that emulation and arithmetic alone take.
With ``n_workers="auto"``: compared with fixed numbers of workers and threads. On CartPole-v1 and LunarLander-v3:
compared with DQN, all with the Zoo's hyperparameters.

``make bench``, or ``python -m benchmarks.throughput``. Each contender has a process of its own, as the training of a
user has. The contenders of a comparison take turns within each repeat, so that a slow phase of the machine affects all
of them; the medians and their ratios are compared. Prints tables, and writes them to
``benchmarks/results/throughput.json`` and, as ``make report`` does, to the docs.
"""

import argparse
import functools
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ale_py
import gymnasium as gym
import psutil
import torch as th
from stable_baselines3 import A2C, DQN
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack

from benchmarks import defaults, report
from benchmarks.learning import describe_hardware
from benchmarks.limits import measure_floor, measure_limit
from benchmarks.memory import read_peak_memory
from benchmarks.pqn import PQN
from benchmarks.report.results import NAMES
from benchmarks.report.tables import make_speed_tables
from benchmarks.slow_envs import make_lanes as make_slow_lanes
from sb3_async1step import A3C, AsyncOneStepQ, AsyncOneStepSarsa
from sb3_async1step.common import parallelism
from sb3_async1step.common.async_algorithm import AsyncAlgorithm
from sb3_async1step.sb3_internals import replace_vec_env_class
from sb3_async1step.vec_envs.ale_vec_env import AleVecEnv
from sb3_async1step.workers.cores import count_usable_cores
from sb3_async1step.zoo import AsyncExperimentManager, register

ENV_ID = "PongNoFrameskip-v4"
MINATAR_ID = "MinAtar/Breakout-v0"
RESULTS = Path(__file__).parent / "results" / "throughput.json"
N_LANES = 16
# The number of workers with n_workers="auto"
N_WORKERS = min(count_usable_cores(), N_LANES)
# DQN learns from step 100 on with its defaults, and from 1000 on with the Zoo's hyperparameters
WARM_UP_STEPS = 1100

#: Makes a model; PQN has the part of BaseAlgorithm's interface that is used here
MakeModel = Callable[[], BaseAlgorithm | PQN]


def make_env(n_envs: int, vec_env_class: type[VecEnv] = DummyVecEnv) -> VecEnv:
    """
    :param n_envs: number of envs
    :param vec_env_class: class of the VecEnv
    :return: Pong as users of SB3 make it, with ``AtariWrapper`` and four stacked frames
    """
    gym.register_envs(ale_py)
    envs = make_atari_env(ENV_ID, n_envs=n_envs, seed=0, vec_env_cls=vec_env_class)  # type: ignore[arg-type]
    return VecFrameStack(envs, n_stack=4)


def make_ours(
    algorithm: type[AsyncAlgorithm],
    n_lanes: int = N_LANES,
    vec_env_class: type[VecEnv] = AleVecEnv,
    n_workers: int | Literal["auto"] = "auto",
    mixed_precision: bool = False,
) -> Any:
    """
    :param algorithm: the class
    :param n_lanes: number of lanes
    :param vec_env_class: class of the VecEnv
    :param n_workers: number of workers
    :param mixed_precision: whether the CNN computes in bfloat16
    :return: the model, with the paper's settings but for the Nature CNN, which the others have, too
    """
    hyperparams = algorithm.paper_hyperparams()
    policy_kwargs = hyperparams.setdefault("policy_kwargs", {})
    policy_kwargs["features_extractor_class"] = NatureCNN
    if mixed_precision:
        policy_kwargs["mixed_precision"] = True
    return algorithm("CnnPolicy", make_env(n_lanes, vec_env_class), n_workers=n_workers, seed=0, **hyperparams)


make_q = functools.partial(make_ours, AsyncOneStepQ)


def make_mlp(env_id: str, n_lanes: int, n_workers: int | Literal["auto"]) -> AsyncOneStepQ:
    """
    :param env_id: an id of Gymnasium
    :param n_lanes: number of lanes
    :param n_workers: number of workers
    :return: the model, with its defaults but for these
    """
    return AsyncOneStepQ("MlpPolicy", env_id, n_envs=n_lanes, n_workers=n_workers, seed=0)


def make_minatar(n_lanes: int, n_workers: int | Literal["auto"]) -> AsyncOneStepQ:
    """
    :param n_lanes: number of lanes
    :param n_workers: number of workers
    :return: the model, with its defaults but for these and the CNN
    """
    defaults.prepare(MINATAR_ID)
    task = defaults.TASKS[MINATAR_ID]
    return AsyncOneStepQ(
        task.policy, MINATAR_ID, n_envs=n_lanes, n_workers=n_workers, policy_kwargs=task.policy_kwargs, seed=0
    )


def make_pong(vec_env_class: type[VecEnv], n_lanes: int, n_workers: int | Literal["auto"]) -> AsyncOneStepQ:
    """
    :param vec_env_class: class of the VecEnv
    :param n_lanes: number of lanes
    :param n_workers: number of workers
    :return: the model, with its defaults but for these
    """
    return AsyncOneStepQ("CnnPolicy", make_env(n_lanes, vec_env_class), n_workers=n_workers, seed=0)


def make_slow(n_lanes: int, n_workers: int | Literal["auto"]) -> AsyncOneStepQ:
    """
    :param n_lanes: number of lanes
    :param n_workers: number of workers
    :return: the model, with its defaults but for these, on CartPole whose steps sleep
    """
    return AsyncOneStepQ("MlpPolicy", make_slow_lanes(n_lanes), n_workers=n_workers, seed=0)


def make_with_threads(make: Callable[[int], AsyncOneStepQ], n_workers: int, n_threads: int) -> AsyncOneStepQ:
    """
    :param make: makes a model, given the number of workers
    :param n_workers: number of workers
    :param n_threads: number of torch's threads for each worker
    :return: the model
    """
    # No network is so small that it gets a single thread
    parallelism.SMALL_NETWORK = 0
    th.set_num_threads(n_workers * n_threads)
    return make(n_workers)


def make_by_zoo(algo: str, env_id: str, vec_env_class: type[VecEnv] = DummyVecEnv) -> BaseAlgorithm:
    """
    :param algo: name of an algorithm in the Zoo
    :param env_id: id of the environment in Gymnasium
    :param vec_env_class: class of the VecEnv
    :return: the model, with the hyperparameters of the Zoo, or those of this repository for our algorithms
    """
    register()
    replace_vec_env_class(AsyncExperimentManager, vec_env_class)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        manager = AsyncExperimentManager(
            argparse.Namespace(vec_env="dummy"), algo, env_id, folder, eval_freq=-1, verbose=0
        )
        experiment = manager.setup_experiment()
    assert experiment is not None
    return experiment[0]


CONTENDERS: dict[str, MakeModel] = {
    # With its defaults, except for a smaller buffer, which fits any machine
    "DQN, 1 env": lambda: DQN("CnnPolicy", make_env(1), buffer_size=10_000, seed=0),
    "A2C, 16 envs": lambda: A2C("CnnPolicy", make_env(N_LANES), seed=0),
    "AsyncOneStepQ, AtariWrapper": lambda: make_q(vec_env_class=DummyVecEnv),
    "AsyncOneStepQ, AtariWrapper, mixed precision": lambda: make_q(vec_env_class=DummyVecEnv, mixed_precision=True),
    "AsyncOneStepQ, SubprocVecEnv": lambda: make_q(vec_env_class=SubprocVecEnv),
    "AsyncOneStepQ, AleVecEnv": make_q,
    "AsyncOneStepSarsa, AleVecEnv": lambda: make_ours(AsyncOneStepSarsa),
    "AsyncOneStepQ, AleVecEnv, mixed precision": lambda: make_q(mixed_precision=True),
    # The Nature CNN's smaller predecessor, 128 lanes
    "AsyncOneStepQ, `make train`": lambda: make_by_zoo("async_one_step_q", ENV_ID, AleVecEnv),
    "PQN, AleVecEnv": lambda: PQN(make_env(N_LANES, AleVecEnv)),
}
# Of these, the machine's limit is measured; whether the CNN computes in bfloat16
LIMITED = {
    "AsyncOneStepQ, AleVecEnv": False,
    "AsyncOneStepQ, AleVecEnv, mixed precision": True,
    "AsyncOneStepQ, `make train`": True,
}
# The contender that is held to one core. The games of other single workers are emulated on the other cores as well,
# while the worker waits for them
ON_ONE_CORE = "1 worker x 8 lanes, on one core"
# Several numbers of workers, first with eight lanes for each, then with sixteen lanes in total
WORKERS: dict[str, MakeModel] = {
    ON_ONE_CORE: lambda: make_q(8, n_workers=1),
    "1 worker x 8 lanes": lambda: make_q(8, n_workers=1),
    "2 workers x 8 lanes": lambda: make_q(16, n_workers=2),
    "4 workers x 8 lanes": lambda: make_q(32, n_workers=4),
    "8 workers x 8 lanes": lambda: make_q(64, n_workers=8),
    "1 worker x 16 lanes": lambda: make_q(16, n_workers=1),
    "4 workers x 4 lanes": lambda: make_q(16, n_workers=4),
    "8 workers x 2 lanes": lambda: make_q(16, n_workers=8),
}
LANES: dict[str, MakeModel] = {
    f"{n} lanes": lambda n=n: make_q(n)  # type: ignore[misc]
    for n in (1, 2, 4, 8, 16, 32, 64, 128)
}
# Of what n_workers="auto" chooses well, the number of lanes and what makes the model
AUTO_CASES: dict[str, tuple[int, Callable[..., AsyncOneStepQ]]] = {
    **{f"CartPole-v1, {n} lanes": (n, functools.partial(make_mlp, "CartPole-v1", n)) for n in (1, 4, 16, 64)},
    "LunarLander-v3, 64 lanes": (64, functools.partial(make_mlp, "LunarLander-v3", 64)),
    "MinAtar Breakout, 64 lanes": (64, functools.partial(make_minatar, 64)),
    "PongNoFrameskip-v4, 16 lanes": (16, functools.partial(make_pong, DummyVecEnv, 16)),
    "PongNoFrameskip-v4, AleVecEnv, 16 lanes": (16, functools.partial(make_pong, AleVecEnv, 16)),
    "PongNoFrameskip-v4, AleVecEnv, 128 lanes": (128, functools.partial(make_pong, AleVecEnv, 128)),
    "CartPole-v1 with steps that sleep, 16 lanes": (16, functools.partial(make_slow, 16)),
}
# It takes turns with fixed numbers of workers and of torch's threads for each of them
AUTO: dict[str, dict[str, MakeModel]] = {
    f"auto, {case}": {
        "auto": functools.partial(make, "auto"),
        **{
            f"{n_workers} workers, {n_threads} threads each": functools.partial(
                make_with_threads, make, n_workers, n_threads
            )
            for n_workers, n_threads in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1))
            if n_workers <= n_lanes
        },
    }
    for case, (n_lanes, make) in AUTO_CASES.items()
}
CLASSIC: dict[str, dict[str, MakeModel]] = {
    env_id: {
        # DQN first, since the others are compared with the first one
        name: functools.partial(make_by_zoo, algo, env_id)
        for algo, name in {"dqn": NAMES["dqn"], **NAMES}.items()
    }
    for env_id in ("CartPole-v1", "LunarLander-v3")
}

# What SB3 has and the same method with workers
ACTOR_CRITICS: dict[str, MakeModel] = {
    "A2C, 16 envs": CONTENDERS["A2C, 16 envs"],
    "A2C, AleVecEnv": lambda: A2C("CnnPolicy", make_env(N_LANES, AleVecEnv), seed=0),
    "A3C, AleVecEnv": lambda: make_ours(A3C),
}

COMPARISONS = {
    "contenders": CONTENDERS,
    "actor-critics": ACTOR_CRITICS,
    "workers": WORKERS,
    "lanes": LANES,
    **AUTO,
    **CLASSIC,
}


class Speed(NamedTuple):
    """
    :param steps_per_second: agent steps
    :param cpu_microseconds: of a processor for each of them, in this process and those of the envs
    """

    steps_per_second: float
    cpu_microseconds: float


class Contender:
    """
    A model that learns in a process of its own.

    :param comparison: name of a comparison, a key of ``COMPARISONS``
    :param name: name of a contender, a key of this comparison
    """

    def __init__(self, comparison: str, name: str) -> None:
        self.process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.started = self.process.submit(start_learning, comparison, name)
        self.measure = measure_on_one_core if name == ON_ONE_CORE else measure
        self.speeds: list[Speed] = []

    def take_turn(self, seconds: float) -> None:
        """
        Continue to learn, and record the speed.

        :param seconds: approximate length of the measurement
        """
        self.speeds.append(self.process.submit(self.measure, seconds).result())

    def stop(self) -> dict[str, Any]:
        """
        End the process.

        :return: agent steps per second and microseconds of a processor per agent step in each turn, and the peak memory
            in MiB
        """
        peak_memory = self.process.submit(stop_learning).result()
        self.process.shutdown()
        steps_per_second, cpu_microseconds = zip(*self.speeds, strict=True)
        return {
            "steps_per_second": steps_per_second,
            "cpu_microseconds": cpu_microseconds,
            "peak_memory_mib": peak_memory,
        }


# The following functions run in the process of a contender
_model: BaseAlgorithm | PQN


def start_learning(comparison: str, name: str) -> None:
    """
    Make the model, and warm it up.

    :param comparison: name of the comparison, see :class:`Contender`
    :param name: name of the contender
    """
    global _model
    _model = COMPARISONS[comparison][name]()
    _model.learn(WARM_UP_STEPS)
    if isinstance(_model, DQN):
        # As for most of a training. At the beginning of one as long as that of measure(), it would act at random, for
        # which it needs no forward pass, unlike our algorithms
        _model.exploration_schedule = ConstantSchedule(_model.exploration_final_eps)


def measure(seconds: float) -> Speed:
    """
    :param seconds: approximate length of the measurement
    :return: the speed
    """
    before, cpu_before, start = _model.num_timesteps, count_cpu_seconds(), time.perf_counter()
    _model.learn(
        10**9,
        callback=lambda locals_, globals_: time.perf_counter() - start < seconds,
        reset_num_timesteps=False,
        log_interval=None,  # type: ignore[arg-type]
    )
    duration, cpu_seconds = time.perf_counter() - start, count_cpu_seconds() - cpu_before
    n_steps = _model.num_timesteps - before
    return Speed(n_steps / duration, 1e6 * cpu_seconds / n_steps)


def count_cpu_seconds() -> float:
    """
    :return: seconds of a processor that this process has taken, and the processes of its envs
    """
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def measure_on_one_core(seconds: float) -> Speed:
    """
    :param seconds: approximate length of the measurement
    :return: the speed while all threads of the process share one core
    """
    th.set_num_threads(1)
    for thread in psutil.Process().threads():
        os.sched_setaffinity(thread.id, {min(os.sched_getaffinity(0))})
    return measure(seconds)


def stop_learning() -> float:
    """
    :return: peak resident memory of the process, plus the memory that the processes of a ``SubprocVecEnv`` do not
        share, in MiB
    """
    children = [child.memory_full_info().uss for child in psutil.Process().children(recursive=True)]
    assert _model.env is not None
    _model.env.close()
    return round(read_peak_memory() + sum(children) / 2**20, 1)


def compare(
    comparison: str, repeats: int, seconds: float, take_part: Callable[[], object] = lambda: None
) -> dict[str, dict[str, Any]]:
    """
    :param comparison: name of a comparison, a key of ``COMPARISONS``
    :param repeats: number of measurements of each contender
    :param seconds: length of a measurement
    :param take_part: function that is called once in each repeat
    :return: the measurements of each contender, see :meth:`Contender.stop`
    """
    contenders = {name: Contender(comparison, name) for name in COMPARISONS[comparison]}
    for contender in contenders.values():
        contender.started.result()
    for _ in range(repeats):
        for contender in contenders.values():
            contender.take_turn(seconds)
        take_part()
    return {name: contender.stop() for name, contender in contenders.items()}


def measure_floor_of_a_worker() -> dict[str, float]:
    """
    :return: microseconds of each part of an agent step, see :func:`~benchmarks.limits.measure_floor`
    """
    model = make_q(N_LANES // N_WORKERS, n_workers=1)
    assert model.env is not None
    try:
        return measure_floor(model)
    finally:
        model.env.close()


def measure_limits() -> dict[str, float]:
    """
    :return: agent steps per second that this machine could make at best, for some contenders
    """
    limits = {}
    for name, mixed_precision in LIMITED.items():
        model: Any = CONTENDERS[name]()
        limits[name] = measure_limit(model, mixed_precision)
        model.env.close()
    return limits


def main() -> None:
    """Measure, print tables, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each contender")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of a measurement")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file for the figures")
    parser.add_argument(
        "--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), help="what to measure anew"
    )
    arguments = parser.parse_args()

    is_partial = set(arguments.only) != set(COMPARISONS)
    results = json.loads(arguments.results.read_text()) if is_partial and arguments.results.exists() else {}
    conditions = results.setdefault("conditions", {})
    floors: list[dict[str, float]] = []
    if "contenders" in arguments.only:
        # With its threads and its memory gone before the contenders start
        results["limits"] = defaults.in_a_process_of_its_own(measure_limits)
    for name in arguments.only:
        take_part = (lambda: floors.append(measure_floor_of_a_worker())) if name == "contenders" else (lambda: None)
        results[name] = compare(name, arguments.repeats, arguments.seconds, take_part)
        conditions[name] = {
            "date": str(date.today()),
            "hardware": describe_hardware(),
            "torch": th.__version__,
            "repeats": arguments.repeats,
            "seconds": arguments.seconds,
        }
    if floors:
        results["floor"] = {part: statistics.median(floor[part] for floor in floors) for part in floors[0]}
    for name, table in make_speed_tables(results).items():
        print(name, *table, "", sep="\n")
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.results == RESULTS:
        report.main()


if __name__ == "__main__":
    main()
