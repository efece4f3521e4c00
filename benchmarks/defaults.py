"""
What one line of Python learns: the constructors' defaults, given an env's id and a seed alone, and DQN's beside them.

``python -m benchmarks.defaults --env CartPole-v1 --algo async_one_step_q --seeds 1 2 3 4 5``

Each training has a process of its own, evaluates nothing, and saves checkpoints; these play afterwards for the learning
curve, and the last model for the score. The figures go to ``benchmarks/results/defaults``; ``make report`` makes a
table and a picture of them. A training whose figures are there already is left out; remove its file to repeat it.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
from rl_zoo3 import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

from benchmarks.learning import RESULTS, Run, describe_hardware, find_checkpoints, play, result_path
from benchmarks.memory import read_peak_memory
from sb3_async1step import MinAtarCNN
from sb3_async1step.zoo import register

N_CHECKPOINTS = 10
N_CURVE_EPISODES = 10


@dataclass(frozen=True)
class Task:
    """
    What is learned.

    :param n_steps: agent steps of ours
    :param n_dqn_steps: agent steps of DQN, whose seconds ours are compared with
    :param policy: the policy
    :param policy_kwargs: its further parameters
    :param n_final_episodes: episodes that the last model plays
    """

    n_steps: int
    n_dqn_steps: int = 100_000
    policy: str = "MlpPolicy"
    policy_kwargs: dict[str, Any] = field(default_factory=dict)
    n_final_episodes: int = 100


PONG = "PongNoFrameskip-v4"
TASKS = {
    "CartPole-v1": Task(200_000),
    "Acrobot-v1": Task(300_000),
    "LunarLander-v3": Task(500_000),
    "MinAtar/Breakout-v0": Task(
        400_000,
        policy="CnnPolicy",
        policy_kwargs={"features_extractor_class": MinAtarCNN, "net_arch": [64, 64]},
    ),
    PONG: Task(2_000_000, n_dqn_steps=300_000, policy="CnnPolicy", n_final_episodes=20),
}


def make_atari_lanes(n_envs: int) -> VecEnv:
    """
    :param n_envs: number of lanes
    :return: Pong as SB3's users make it: ``AtariWrapper``, four stacked frames
    """
    gym.register_envs(ale_py)
    return VecFrameStack(make_atari_env(PONG, n_envs=n_envs), n_stack=4)


def make_env(env_id: str, n_envs: int) -> VecEnv:
    """
    :param env_id: a key of ``TASKS``
    :param n_envs: number of lanes
    :return: the env to play in
    """
    return make_atari_lanes(n_envs) if env_id == PONG else make_vec_env(env_id, n_envs=n_envs)


def train(env_id: str, algo: str, seed: int, n_steps: int | None, folder: Path) -> tuple[float, float]:
    """
    Train in the calling process, and save checkpoints and the last model.

    :param env_id: a key of ``TASKS``
    :param algo: the Zoo's id
    :param seed: of the training
    :param n_steps: agent steps, by default those of the task
    :param folder: for the models
    :return: seconds from the construction to the end of ``learn()``, and peak memory in MiB
    """
    prepare(env_id)
    task = TASKS[env_id]
    n_steps = n_steps or (task.n_dqn_steps if algo == "dqn" else task.n_steps)
    # DQN's default takes 56 GB of stacked Atari frames
    buffer: dict[str, Any] = {"buffer_size": 100_000} if algo == "dqn" and env_id == PONG else {}
    start = time.time()
    env = make_atari_lanes(1 if algo == "dqn" else 16) if env_id == PONG else env_id
    model = ALGOS[algo](task.policy, env, seed=seed, policy_kwargs=task.policy_kwargs, **buffer)
    save_freq = max(1, n_steps // N_CHECKPOINTS // model.n_envs)
    model.learn(n_steps, callback=CheckpointCallback(save_freq, str(folder)))
    seconds = time.time() - start
    model.save(folder / "last")
    (folder / "start").write_text(str(start))
    return seconds, read_peak_memory()


def prepare(env_id: str) -> None:
    """
    :param env_id: what Gymnasium shall know, beside our algorithms in the Zoo
    """
    register()
    if env_id.startswith("MinAtar/"):
        import_module("minatar.gym").register_envs()


def in_a_process_of_its_own(function: Callable[..., Any], *args: Any) -> Any:
    """
    :param function: of a module
    :param args: its arguments
    :return: what it returns
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def run_and_evaluate(env_id: str, algo: str, seed: int, n_steps: int | None) -> Run:
    """
    :param env_id: a key of ``TASKS``
    :param algo: the Zoo's id
    :param seed: of the training
    :param n_steps: agent steps, by default those of the task
    :return: the figures
    """
    task = TASKS[env_id]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds, peak_memory = in_a_process_of_its_own(train, env_id, algo, seed, n_steps, folder)
        start = float((folder / "start").read_text())
        checkpoints = find_checkpoints(folder)
        load = ALGOS[algo].load

        def evaluate(model: BaseAlgorithm, n_episodes: int) -> list[float]:
            return play(model, make_env(env_id, N_CURVE_EPISODES), n_episodes, deterministic=True)

        curve = [np.mean(evaluate(load(path), N_CURVE_EPISODES)) for path in checkpoints.values()]
        model = load(folder / "last")
        return Run(
            command=f"python -m benchmarks.defaults --env {env_id} --algo {algo} --seeds {seed}"
            + (f" --steps {n_steps}" if n_steps else ""),
            date=str(date.today()),
            hardware=describe_hardware(),
            versions={name: version(name) for name in ("stable-baselines3", "torch", "gymnasium")},
            n_steps=model.num_timesteps,
            n_env_steps=model.num_timesteps,
            seconds=round(seconds, 2),
            peak_memory_mib=round(peak_memory, 1),
            curve_steps=list(checkpoints),
            curve_seconds=[round(path.stat().st_mtime - start, 2) for path in checkpoints.values()],
            curve_returns=[round(float(value), 3) for value in curve],
            final_returns=[round(value, 3) for value in evaluate(model, task.n_final_episodes)],
        )


def main() -> None:
    """Train and evaluate one run for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", required=True, choices=TASKS, help="Gymnasium's id")
    parser.add_argument("--algo", required=True, help="the Zoo's id")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, help="agent steps, by default those of the table in the docs")
    parser.add_argument("--results", type=Path, default=RESULTS / "defaults", help="folder for the figures")
    arguments = parser.parse_args()
    prepare(arguments.env)
    for seed in arguments.seeds:
        path = result_path(arguments.results, arguments.env, arguments.algo, seed)
        if path.exists():
            print(f"{path} is there already: remove it, or name another folder with --results", flush=True)
            continue
        run = run_and_evaluate(arguments.env, arguments.algo, seed, arguments.steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(run), indent=1) + "\n")
        print(f"{arguments.env} {path.stem}: {np.mean(run.final_returns):.1f}, {run.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
