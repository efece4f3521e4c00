"""
Train with the RL Zoo, evaluate what it saved, and keep the figures in ``benchmarks/results``.

``python -m benchmarks.learning --algo async_one_step_q --env CartPole-v1 --seeds 1 2 3 4 5``

The trainings themselves evaluate nothing, so that their seconds are those of learning alone; the Zoo saves a
checkpoint now and then. Afterwards, each of these plays some episodes for the learning curve, and the last model 100.
``python -m benchmarks.report`` makes tables and pictures of the figures.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import rl_zoo3.import_envs
import yaml
from rl_zoo3 import ALGOS
from rl_zoo3.utils import create_test_env, get_saved_hyperparams
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_async1step.common.intra_op_threads import count_usable_cores
from sb3_async1step.zoo import ALGORITHMS, hyperparams_path, register, register_minatar

RESULTS = Path(__file__).parent / "results"
EVALUATION_SEED = 10_000
N_FINAL_EPISODES = 100


@dataclass
class Run:
    """
    A training, and how the models that it saved play.

    :param command: what trained
    :param date: when
    :param hardware: on what
    :param versions: of the packages that matter
    :param n_steps: agent steps
    :param n_env_steps: the environment's own steps, more if actions are repeated; finished episodes only
    :param seconds: from the envs' construction to the last model's file
    :param peak_memory_mib: largest resident memory of the process
    :param curve_steps: agent steps at each checkpoint
    :param curve_seconds: seconds at each checkpoint
    :param curve_returns: mean return at each checkpoint
    :param final_returns: return of each of the last model's episodes
    """

    command: str
    date: str
    hardware: str
    versions: dict[str, str]
    n_steps: int
    n_env_steps: int
    seconds: float
    peak_memory_mib: float
    curve_steps: list[int]
    curve_seconds: list[float]
    curve_returns: list[float]
    final_returns: list[float]


def result_path(results: Path, env_id: str, algo: str, seed: int) -> Path:
    """
    :param results: folder of all results
    :param env_id: Gymnasium's id
    :param algo: the Zoo's id
    :param seed: seed of the training
    :return: where the figures of this run are kept
    """
    return results / env_id.replace("/", "-") / f"{algo}_{seed}.json"


def train(options: list[str], folder: Path) -> tuple[Path, float]:
    """
    :param options: of the Zoo's ``train``
    :param folder: for its logs
    :return: the folder of this run, and the peak memory in MiB
    :raises RuntimeError: if the training failed
    """
    command = [sys.executable, "-m", "sb3_async1step.zoo", "train", *options, "-f", str(folder)]
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"The training failed:\n{(folder / 'output.txt').read_text()[-5000:]}")
    (run_folder,) = folder.glob("*/*_1")
    # Kibibytes on Linux
    return run_folder, usage.ru_maxrss / 1024


def make_env(folder: Path, env_id: str, n_envs: int) -> VecEnv:
    """
    :param folder: of the run
    :param env_id: Gymnasium's id
    :param n_envs: number of lanes
    :return: the Zoo's env for evaluation, with the run's wrappers and statistics
    """
    stats_folder = folder / env_id.replace("/", "-")
    hyperparams, stats_path = get_saved_hyperparams(str(stats_folder), test_mode=True)
    return create_test_env(
        env_id,
        n_envs=n_envs,
        stats_path=stats_path,
        seed=EVALUATION_SEED,
        should_render=False,
        hyperparams=hyperparams,
        vec_env_cls=DummyVecEnv,
    )


def play(model: BaseAlgorithm, env: VecEnv, n_episodes: int, deterministic: bool) -> list[float]:
    """
    :param model: plays
    :param env: the env, which is seeded first
    :param n_episodes: number of episodes
    :param deterministic: whether it acts greedily
    :return: return of each episode
    """
    env.seed(EVALUATION_SEED)
    returns, _ = evaluate_policy(
        model, env, n_episodes, deterministic=deterministic, return_episode_rewards=True, warn=False
    )
    assert isinstance(returns, list)
    return returns


def read_start(folder: Path) -> float:
    """
    :param folder: of the run
    :return: when its envs were made, in seconds since the epoch
    """
    header = (folder / "0.monitor.csv").read_text().splitlines()[0]
    return float(json.loads(header.removeprefix("#"))["t_start"])


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """
    :param folder: of the run
    :return: the model files by their agent steps, in order
    """
    files = {int(re.findall(r"\d+", path.stem)[-1]): path for path in folder.glob("rl_model_*_steps.zip")}
    return dict(sorted(files.items()))


def run_and_evaluate(env_id: str, algo: str, options: list[str], n_episodes: int) -> Run:
    """
    :param env_id: Gymnasium's id
    :param algo: the Zoo's id
    :param options: of the Zoo's ``train``
    :param n_episodes: episodes at each checkpoint
    :return: the figures
    """
    with tempfile.TemporaryDirectory() as name:
        folder, peak_memory = train(options, Path(name))
        start = read_start(folder)
        # Atari's scores are those of policies that act at random now and then, in the Zoo as elsewhere
        is_atari = "AtariWrapper" in (folder / env_id.replace("/", "-") / "config.yml").read_text()
        evaluate = partial(play, env=make_env(folder, env_id, n_envs=20), deterministic=not is_atari)
        load = partial(ALGOS[algo].load, device="cpu")
        checkpoints = find_checkpoints(folder)
        curve = [np.mean(evaluate(load(path), n_episodes=n_episodes)) for path in checkpoints.values()]
        last = folder / f"{env_id.replace('/', '-')}.zip"
        model = load(last)
        return Run(
            command=" ".join(["sb3-async1step", "train", *options]),
            date=str(date.today()),
            hardware=f"{platform.machine()}, {count_usable_cores()} cores",
            versions={name: version(name) for name in ("stable-baselines3", "torch", "gymnasium", "rl_zoo3")},
            n_steps=model.num_timesteps,
            n_env_steps=int(load_results(str(folder))["l"].sum()),
            seconds=round(last.stat().st_mtime - start, 2),
            peak_memory_mib=round(peak_memory, 1),
            curve_steps=list(checkpoints),
            curve_seconds=[round(path.stat().st_mtime - start, 2) for path in checkpoints.values()],
            curve_returns=[round(float(value), 3) for value in curve],
            final_returns=[round(value, 3) for value in evaluate(model, n_episodes=N_FINAL_EPISODES)],
        )


def read_n_steps(env_id: str, algo: str) -> int:
    """
    :param env_id: Gymnasium's id
    :param algo: the Zoo's id
    :return: the budget in the hyperparameters' file that ``train`` finds
    """
    path = hyperparams_path(algo) if algo in ALGORITHMS else Path(rl_zoo3.__file__).parent / f"hyperparams/{algo}.yml"
    entries = yaml.safe_load(Path(path).read_text())
    return int(float(entries[env_id if env_id in entries else "atari"]["n_timesteps"]))


def main() -> None:
    """Train and evaluate one run for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", required=True, help="the Zoo's id")
    parser.add_argument("--env", required=True, help="Gymnasium's id")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, help="agent steps, by default those of the hyperparameters' file")
    parser.add_argument("--checkpoints", type=int, default=20, help="how many models are saved on the way")
    parser.add_argument("--episodes", type=int, default=20, help="episodes that each of them plays")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    arguments = parser.parse_args()
    register()
    register_minatar()
    n_steps = arguments.steps or read_n_steps(arguments.env, arguments.algo)
    for seed in arguments.seeds:
        options = ["--algo", arguments.algo, "--env", arguments.env, "--seed", str(seed), "-n", str(n_steps)]
        options += ["--eval-freq", "-1", "--save-freq", str(n_steps // arguments.checkpoints)]
        run = run_and_evaluate(arguments.env, arguments.algo, options, arguments.episodes)
        path = result_path(arguments.results, arguments.env, arguments.algo, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(run), indent=1) + "\n")
        mean = np.mean(run.final_returns)
        print(f"{path.stem}: {mean:.1f} after {run.n_steps} steps, {run.seconds:.0f} s, {run.peak_memory_mib:.0f} MiB")


if __name__ == "__main__":
    main()
