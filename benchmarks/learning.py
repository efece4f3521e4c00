"""
Train with the RL Zoo, evaluate the saved models, and store the results in ``benchmarks/results``.

``python -m benchmarks.learning --algo async_one_step_q --env CartPole-v1 --seeds 1 2 3 4 5``

There is no evaluation during the trainings, so that their seconds are those of learning alone; the Zoo saves
checkpoints at regular intervals. Afterwards, each checkpoint plays some episodes for the learning curve. The last model
plays 100 episodes, or, on Atari games, as many steps as in the Zoo's ``benchmark`` command.
If the command is given again, a training that was interrupted continues from its last checkpoint (of SB3's algorithms,
which can't, it begins again), and one that has finished is only evaluated again; to repeat it, remove its folder from
the logs.
``python -m benchmarks.report`` makes tables and pictures of the results.
"""

import argparse
import json
import math
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import rl_zoo3.import_envs
import yaml
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import create_test_env, get_saved_hyperparams
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize, unwrap_vec_normalize

from benchmarks.memory import wait_and_measure
from sb3_async1step.registry import ALGORITHMS
from sb3_async1step.vec_envs.ale_vec_env import AleVecEnv
from sb3_async1step.workers.cores import count_usable_cores
from sb3_async1step.zoo import hyperparams_path, register, register_minatar
from sb3_async1step.zoo.experiment_manager import find_statistics

RESULTS = Path(__file__).parent / "results"
EVALUATION_SEED = 10_000
N_FINAL_EPISODES = 100
# Agent steps of the Zoo's benchmark, and number of lanes among which they are divided
BENCHMARK_STEPS = 150_000
BENCHMARK_LANES = 10
# Name of the file that says how a training was made. There is none if it was interrupted
RECORD = "record.json"


@dataclass
class Run:
    """
    The results of a training.

    :param command: command of the training
    :param date: date of the end of the training
    :param hardware: processor and number of cores of the training
    :param versions: versions of the main packages in the training
    :param n_steps: number of agent steps
    :param n_env_steps: number of environment steps in finished episodes, which is larger if actions are repeated
    :param seconds: seconds from the construction of the envs to the file of the last model
    :param peak_memory_mib: peak resident memory of the process; of the last one if the training was interrupted
    :param curve_steps: agent steps at each checkpoint
    :param curve_seconds: seconds at each checkpoint
    :param curve_returns: mean return of each checkpoint
    :param final_returns: return of each episode of the last model
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
    :param env_id: id of the environment in Gymnasium
    :param algo: name of the algorithm in the Zoo
    :param seed: seed of the training
    :return: path of the file with the results of this training
    """
    return results / env_id.replace("/", "-") / f"{algo}_{seed}.json"


def describe_hardware() -> str:
    """
    :return: processor and number of cores
    """
    return f"{platform.machine()}, {count_usable_cores()} cores"


def describe_command(options: list[str], n_steps: int) -> str:
    """
    :param options: options of the Zoo's ``train``
    :param n_steps: number of agent steps
    :return: the command of the whole training, also if it was made in parts
    """
    return " ".join(["sb3-async1step", "train", *options, "-n", str(n_steps)])


def find_parts(folder: Path) -> list[Path]:
    """
    :param folder: folder of the Zoo's logs of one training
    :return: the folders of its parts, in order: each continues from the last checkpoint before it
    """
    parts = (path for path in folder.glob("*/*_*") if path.name.rsplit("_", 1)[1].isdecimal())
    return sorted(parts, key=lambda path: int(path.name.rsplit("_", 1)[1]))


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """
    :param folder: folder of a part of a training
    :return: the files of the checkpoints by their agent steps, in order
    """
    files = {int(re.findall(r"\d+", path.stem)[-1]): path for path in folder.glob("rl_model_*_steps.zip")}
    return dict(sorted(files.items()))


def train(options: list[str], n_steps: int, folder: Path, name: str) -> None:
    """
    Train, or continue a training that was interrupted.

    :param options: options of the Zoo's ``train``
    :param n_steps: number of agent steps in total
    :param folder: folder for the logs
    :param name: name of the file of the last model
    :raises RuntimeError: if the training fails, or is interrupted (then, too, the Zoo saves the model)
    """
    checkpoints = {steps: path for part in find_parts(folder) for steps, path in find_checkpoints(part).items()}
    n_done = max(checkpoints, default=0)
    if n_done >= n_steps:
        # Only this program was killed, at the very end
        peak_memory = math.nan
        complete_part(checkpoints[n_done], name)
    else:
        start = ["-i", str(checkpoints[n_done])] if checkpoints else []
        peak_memory = run_zoo([*options, "-n", str(n_steps - n_done), "-f", str(folder), *start], folder)
    n_trained = read_num_timesteps(find_parts(folder)[-1] / name)
    if n_trained < n_steps:
        raise RuntimeError(
            f"The training was interrupted after {n_trained} of {n_steps} steps. If the command is given again, it "
            "goes on from its last checkpoint."
        )
    record = {
        "command": describe_command(options, n_steps),
        "date": str(date.today()),
        "hardware": describe_hardware(),
        "versions": {name: version(name) for name in ("stable-baselines3", "torch", "gymnasium", "rl_zoo3")},
        "peak_memory_mib": round(peak_memory, 1),
    }
    (folder / RECORD).write_text(json.dumps(record))


def run_zoo(options: list[str], folder: Path) -> float:
    """
    :param options: options of the Zoo's ``train``
    :param folder: folder for what it prints
    :return: peak memory in MiB
    :raises RuntimeError: if it fails
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "w") as output:
        command = [sys.executable, "-m", "sb3_async1step.zoo", "train", *options]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        peak_memory = wait_and_measure(process)
    if process.returncode != 0:
        raise RuntimeError(f"The training failed:\n{(folder / 'output.txt').read_text()[-5000:]}")
    return peak_memory


def read_num_timesteps(path: Path) -> int:
    """
    :param path: file of a model
    :return: agent steps of its training
    """
    data, _, _ = load_from_zip_file(path)
    assert data is not None
    return data["num_timesteps"]


def complete_part(checkpoint: Path, name: str) -> None:
    """
    Write what the Zoo writes at the end, unless it has.

    :param checkpoint: the checkpoint of the last step
    :param name: name of the file of the last model
    """
    last, statistics = checkpoint.with_name(name), find_statistics(checkpoint)
    if not last.exists():
        shutil.copy2(checkpoint, last)
        if statistics is not None:
            shutil.copy2(statistics, last.with_suffix("") / "vecnormalize.pkl")


def read_start(folder: Path) -> float:
    """
    :param folder: folder of a part of a training
    :return: the time when its envs were made, in seconds since the epoch
    """
    header = (folder / "0.monitor.csv").read_text().splitlines()[0]
    return float(json.loads(header.removeprefix("#"))["t_start"])


@dataclass
class SavedModel:
    """
    A model that a training saved.

    :param path: path of the file
    :param seconds: seconds of training until the file was written
    """

    path: Path
    seconds: float


def list_saved(parts: list[Path], name: str) -> tuple[dict[int, SavedModel], SavedModel]:
    """
    :param parts: folders of the parts of a training
    :param name: name of the file of the last model
    :return: the checkpoints by their agent steps, and the last model. The time that an interrupted part took after its
        last checkpoint does not count
    """
    checkpoints: dict[int, SavedModel] = {}
    seconds_before = 0.0
    for part in parts:
        start = read_start(part) - seconds_before
        for steps, path in find_checkpoints(part).items():
            checkpoints[steps] = SavedModel(path, round(path.stat().st_mtime - start, 2))
            seconds_before = checkpoints[steps].seconds
    last = parts[-1] / name
    return checkpoints, SavedModel(last, round(last.stat().st_mtime - start, 2))


def make_env(folder: Path, env_id: str, n_envs: int) -> VecEnv:
    """
    :param folder: folder of a part of a training
    :param env_id: id of the environment in Gymnasium
    :param n_envs: number of lanes
    :return: the Zoo's env for evaluation, with the wrappers and statistics of the training
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
        vec_env_cls=AleVecEnv if ExperimentManager.is_atari(env_id) else DummyVecEnv,
    )


def play(model: BaseAlgorithm, env: VecEnv, n_episodes: int, deterministic: bool) -> list[float]:
    """
    :param model: the model to evaluate
    :param env: a new env, which is seeded, and closed afterwards. Reset in the middle of a game, those of Atari would
        go on with it, and with what another model has scored in it
    :param n_episodes: number of episodes
    :param deterministic: whether the model acts greedily
    :return: the return of each episode
    """
    env.seed(EVALUATION_SEED)
    try:
        returns, _ = evaluate_policy(
            model, env, n_episodes, deterministic=deterministic, return_episode_rewards=True, warn=False
        )
    finally:
        env.close()
    assert isinstance(returns, list)
    return returns


def play_checkpoint(
    model: BaseAlgorithm, env: VecEnv, n_episodes: int, deterministic: bool, statistics: Path | None
) -> list[float]:
    """
    :param model: a checkpoint
    :param env: see :func:`play`
    :param n_episodes: number of episodes
    :param deterministic: whether the model acts greedily
    :param statistics: file with the statistics of ``VecNormalize`` at that time, those of the end if there is none
    :return: the return of each episode
    """
    normalize = unwrap_vec_normalize(env)
    if statistics is not None and normalize is not None and normalize.norm_obs:
        normalize.obs_rms = VecNormalize.load(str(statistics), normalize.venv).obs_rms
    return play(model, env, n_episodes, deterministic)


def play_by_zoo(env_id: str, algo: str, folder: Path, n_steps: int) -> list[float]:
    """
    :param env_id: id of an Atari game in Gymnasium
    :param algo: name of the algorithm in the Zoo
    :param folder: folder of the logs of a training
    :param n_steps: number of agent steps
    :return: the return of each episode that the last model finishes in the Zoo's ``benchmark``
    """
    scores = folder / "benchmark"
    # The command skips the evaluations that it finds there
    shutil.rmtree(scores, ignore_errors=True)
    command = [sys.executable, "-m", "sb3_async1step.zoo", "benchmark", "--no-hub", "--test-mode"]
    command += ["--log-dir", str(folder), "--benchmark-dir", str(scores)]
    command += ["--n-envs", str(BENCHMARK_LANES), "-n", str(n_steps // BENCHMARK_LANES)]
    subprocess.run(command, check=True)
    return load_results(str(scores / f"{algo}-{env_id}"))["r"].tolist()


def run_and_evaluate(env_id: str, algo: str, options: list[str], n_steps: int, n_episodes: int, folder: Path) -> Run:
    """
    :param env_id: id of the environment in Gymnasium
    :param algo: name of the algorithm in the Zoo
    :param options: options of the Zoo's ``train``
    :param n_steps: number of agent steps
    :param n_episodes: number of episodes for each checkpoint
    :param folder: folder for the Zoo's logs
    :return: the results
    :raises RuntimeError: if the training fails or is interrupted, or the folder holds a shorter one
    """
    name = f"{env_id.replace('/', '-')}.zip"
    if not (folder / RECORD).exists():
        if algo not in ALGORITHMS:
            shutil.rmtree(folder, ignore_errors=True)
        train(options, n_steps, folder, name)
    parts = find_parts(folder)
    checkpoints, last = list_saved(parts, name)
    load = partial(ALGOS[algo].load, device="cpu")
    model = load(last.path)
    if model.num_timesteps < n_steps:
        raise RuntimeError(f"{folder} holds a training of {model.num_timesteps} instead of {n_steps} steps: remove it.")
    is_atari = ExperimentManager.is_atari(env_id)
    # Scores on Atari are usually, and in the Zoo, those of policies that sometimes act at random. With as many lanes as
    # episodes, each lane plays one of them
    curve = [
        np.mean(
            play_checkpoint(
                load(saved.path),
                make_env(parts[-1], env_id, n_episodes),
                n_episodes,
                not is_atari,
                find_statistics(saved.path),
            )
        )
        for saved in checkpoints.values()
    ]
    if is_atari:
        final_returns = play_by_zoo(env_id, algo, folder, BENCHMARK_STEPS)
    else:
        final_returns = play(model, make_env(parts[-1], env_id, n_episodes), N_FINAL_EPISODES, deterministic=True)
    record = json.loads((folder / RECORD).read_text())
    # Older records do not have it
    record.setdefault("command", describe_command(options, n_steps))
    return Run(
        **record,
        n_steps=model.num_timesteps,
        n_env_steps=int(sum(load_results(str(part))["l"].sum() for part in parts)),
        seconds=last.seconds,
        curve_steps=list(checkpoints),
        curve_seconds=[saved.seconds for saved in checkpoints.values()],
        curve_returns=[round(float(value), 3) for value in curve],
        final_returns=[round(value, 3) for value in final_returns],
    )


def read_n_steps(env_id: str, algo: str) -> int:
    """
    :param env_id: id of the environment in Gymnasium
    :param algo: name of the algorithm in the Zoo
    :return: number of agent steps in the file of hyperparameters that ``train`` uses
    """
    path = hyperparams_path(algo) if algo in ALGORITHMS else Path(rl_zoo3.__file__).parent / f"hyperparams/{algo}.yml"
    entries = yaml.safe_load(Path(path).read_text())
    return int(float(entries[env_id if env_id in entries else "atari"]["n_timesteps"]))


def main() -> None:
    """Train and evaluate once for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", required=True, help="the Zoo's id")
    parser.add_argument("--env", required=True, help="Gymnasium's id")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, help="agent steps, by default those of the hyperparameters' file")
    parser.add_argument("--checkpoints", type=int, default=20, help="how many models are saved on the way")
    parser.add_argument("--episodes", type=int, default=20, help="episodes that each of them plays")
    parser.add_argument("--logs", type=Path, default=Path("logs/benchmarks"), help="folder for the Zoo's logs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    arguments = parser.parse_args()
    register()
    register_minatar()
    n_steps = arguments.steps or read_n_steps(arguments.env, arguments.algo)
    for seed in arguments.seeds:
        options = ["--algo", arguments.algo, "--env", arguments.env, "--seed", str(seed)]
        options += ["--eval-freq", "-1", "--save-freq", str(n_steps // arguments.checkpoints)]
        if arguments.algo in ALGORITHMS and ExperimentManager.is_atari(arguments.env):
            options += ["--vec-env", "ale"]
        path = result_path(arguments.results, arguments.env, arguments.algo, seed)
        folder = arguments.logs / path.relative_to(arguments.results).with_suffix("")
        run = run_and_evaluate(arguments.env, arguments.algo, options, n_steps, arguments.episodes, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(run), indent=1) + "\n")
        mean = np.mean(run.final_returns)
        print(f"{path.stem}: {mean:.1f} after {run.n_steps} steps, {run.seconds:.0f} s, {run.peak_memory_mib:.0f} MiB")


if __name__ == "__main__":
    main()
