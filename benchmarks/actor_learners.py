"""
Environment steps and seconds until a reference score, for several numbers of actor-learners: the paper's Table 2.

``python -m benchmarks.actor_learners --algo async_one_step_q --env CartPole-v1 --seeds 1 2 3 4 5``

The actor-learners are the lanes of one worker, or each has a worker (a thread) of its own, as in the paper. Nothing
else differs between the numbers of actor-learners. Each training ends when the mean return of its last 100 episodes,
including exploration, reaches the reference score. Measurements that are in the file of results already are not
repeated, so that an interrupted study continues. ``python -m benchmarks.report`` makes the table and the picture.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from stable_baselines3.common.env_util import make_vec_env

from benchmarks.learning import RESULTS, describe_hardware
from sb3_async1step import MinAtarCNN, SharedRMSprop
from sb3_async1step.registry import ALGORITHMS
from sb3_async1step.value_based.algorithm import ValueBasedAlgorithm
from sb3_async1step.zoo import register_minatar

FOLDER = RESULTS / "actor_learners"
N_ACTOR_LEARNERS = (1, 2, 4, 8, 16)
LAYOUTS = ("one worker", "a worker for each")
# Those whose epsilon and target network the tasks below set
VALUE_BASED: dict[str, type[ValueBasedAlgorithm]] = {
    algo: algorithm.model_class
    for algo, algorithm in ALGORITHMS.items()
    if issubclass(algorithm.model_class, ValueBasedAlgorithm)
}


@dataclass(frozen=True)
class Task:
    """
    A task to be learned, with the parameters that differ from the paper's.

    :param reference_score: mean return of the last 100 episodes at which a training ends
    :param max_steps: number of environment steps after which a training is given up
    :param exploration_steps: number of environment steps over which epsilon is annealed, to 0.1 in all lanes
    :param parameters: parameters of the algorithm
    """

    reference_score: float
    max_steps: int
    exploration_steps: int
    parameters: dict[str, Any]


TASKS = {
    "CartPole-v1": Task(
        reference_score=100.0,
        max_steps=200_000,
        exploration_steps=20_000,
        parameters={
            "policy": "MlpPolicy",
            "learning_rate": 5e-4,
            "target_update_interval": 500,
            "policy_kwargs": {"optimizer_class": SharedRMSprop, "net_arch": [64, 64], "layer_norm": True},
        },
    ),
    "MinAtar/Breakout-v0": Task(
        reference_score=1.0,
        max_steps=200_000,
        exploration_steps=10_000,
        parameters={
            "policy": "CnnPolicy",
            "learning_rate": 3e-4,
            "target_update_interval": 2000,
            "policy_kwargs": {
                "optimizer_class": SharedRMSprop,
                "features_extractor_class": MinAtarCNN,
                "layer_norm": False,
            },
        },
    ),
}


class Setting(NamedTuple):
    """
    The setting of a training.

    :param layout: one of ``LAYOUTS``
    :param n_lanes: number of actor-learners
    :param seed: seed of the training
    """

    layout: str
    n_lanes: int
    seed: int


class Measurement(NamedTuple):
    """
    A row in the file of results.

    :param layout: layout, see :class:`Setting`
    :param n_lanes: number of actor-learners
    :param seed: seed of the training
    :param steps: number of environment steps until the reference score, infinite if it was not reached
    :param seconds: seconds until the reference score, infinite if it was not reached
    :param date: date of the measurement
    :param hardware: processor and number of cores
    """

    layout: str
    n_lanes: int
    seed: int
    steps: float
    seconds: float
    date: str
    hardware: str


def results_path(env_id: str, algo: str) -> Path:
    """
    :param env_id: id of the environment in Gymnasium
    :param algo: name of the algorithm in the Zoo
    :return: path of the file of measurements
    """
    return FOLDER / f"{env_id.replace('/', '-')}_{algo}.csv"


def read_measurements(path: Path) -> pd.DataFrame:
    """
    :param path: path of the file of measurements
    :return: the measurements, an empty table if there is no file
    """
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=Measurement._fields)


def append_measurement(path: Path, measurement: Measurement) -> None:
    """
    :param path: path of the file of measurements
    :param measurement: the measurement to append
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([measurement]).to_csv(path, mode="a", header=not path.exists(), index=False)


def is_measured(measurements: pd.DataFrame, setting: Setting) -> bool:
    """
    :param measurements: the measurements, see :func:`read_measurements`
    :param setting: the setting of a training
    :return: whether they contain this setting
    """
    return bool((measurements[list(Setting._fields)] == list(setting)).all(axis=1).any())


def read_all(folder: Path = FOLDER) -> dict[tuple[str, str], pd.DataFrame]:
    """
    :param folder: folder of the files
    :return: the measurements by environment and algorithm, for those that have some
    """
    paths = {(env_id, algo): folder / results_path(env_id, algo).name for env_id in TASKS for algo in VALUE_BASED}
    return {key: read_measurements(path) for key, path in paths.items() if path.exists()}


def list_settings(seeds: Sequence[int]) -> list[Setting]:
    """
    :param seeds: seeds of the trainings
    :return: all settings to measure; for a single actor-learner there is only one layout
    """
    return [
        Setting(layout, n_lanes, seed)
        for seed in seeds
        for n_lanes in N_ACTOR_LEARNERS
        for layout in (LAYOUTS if n_lanes > 1 else LAYOUTS[:1])
    ]


def measure(env_id: str, algo: str, setting: Setting) -> Measurement:
    """
    Train until the reference score is reached.

    :param env_id: id of the environment in Gymnasium
    :param algo: name of the algorithm in the Zoo
    :param setting: the setting of the training
    :return: the measurement
    """
    task = TASKS[env_id]
    model_class = VALUE_BASED[algo]
    parameters = model_class.paper_hyperparams() | {
        "exploration_fraction": task.exploration_steps / task.max_steps,
        "exploration_final_eps": 0.1,
        **task.parameters,
    }
    model = model_class(
        env=make_vec_env(env_id, n_envs=setting.n_lanes, seed=setting.seed, env_kwargs={"render_mode": None}),
        n_workers=1 if setting.layout == "one worker" else setting.n_lanes,
        seed=setting.seed,
        **parameters,
    )

    def is_not_there_yet(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        episodes = model.ep_info_buffer
        assert episodes is not None
        is_there = len(episodes) == 100 and np.mean([episode["r"] for episode in episodes]) >= task.reference_score
        return not is_there

    start = time.perf_counter()
    model.learn(task.max_steps, callback=is_not_there_yet)
    seconds = round(time.perf_counter() - start, 1)
    reached = not is_not_there_yet({}, {})
    return Measurement(
        *setting,
        steps=model.num_timesteps if reached else np.inf,
        seconds=seconds if reached else np.inf,
        date=str(date.today()),
        hardware=describe_hardware(),
    )


def main() -> None:
    """Measure all settings that are not in the file of results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", required=True, choices=VALUE_BASED)
    parser.add_argument("--env", required=True, choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder for the measurements")
    arguments = parser.parse_args()
    register_minatar()
    path = arguments.results / results_path(arguments.env, arguments.algo).name
    for setting in list_settings(arguments.seeds):
        if is_measured(read_measurements(path), setting):
            print(*setting, f"is in {path} already: remove it, or name another folder with --results", flush=True)
            continue
        measurement = measure(arguments.env, arguments.algo, setting)
        append_measurement(path, measurement)
        print(*setting, measurement.steps, measurement.seconds, flush=True)


if __name__ == "__main__":
    main()
