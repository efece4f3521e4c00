"""Reads the files in ``benchmarks/results``, and knows what they are compared with."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning import RESULTS, Run
from sb3_async1step.registry import ALGORITHMS

# Mean return that counts as having learned the task, by the name of the folder of results
THRESHOLDS = {
    "CartPole-v1": 475.0,
    "Acrobot-v1": -90.0,
    "MountainCar-v0": -120.0,
    "MountainCarContinuous-v0": 90.0,
    "LunarLander-v3": 180.0,
    "Pendulum-v1": -180.0,
}
# The same of the constructors' defaults
DEFAULTS_THRESHOLDS = {
    "CartPole-v1": 475.0,
    "Acrobot-v1": -100.0,
    "LunarLander-v3": 100.0,
    "MinAtar-Breakout-v0": 8.0,
    "PongNoFrameskip-v4": -10.0,
}
# Scores whose time is told
ATARI = {
    "PongNoFrameskip-v4": (0.0, 10.0, 18.0),
    "BreakoutNoFrameskip-v4": (10.0, 30.0, 100.0),
    "SpaceInvadersNoFrameskip-v4": (300.0, 600.0),
    "QbertNoFrameskip-v4": (1000.0, 4000.0),
    "BeamRiderNoFrameskip-v4": (1000.0, 4000.0),
    "SeaquestNoFrameskip-v4": (500.0, 2000.0),
}
# Of random play and of a human tester: Wang et al. 2016, "Dueling Network Architectures for Deep Reinforcement
# Learning", table 2
RANDOM_AND_HUMAN_SCORES = {
    "PongNoFrameskip-v4": (-20.7, 14.6),
    "BreakoutNoFrameskip-v4": (1.7, 30.5),
    "SpaceInvadersNoFrameskip-v4": (148.0, 1668.7),
    "QbertNoFrameskip-v4": (163.9, 13455.0),
    "BeamRiderNoFrameskip-v4": (363.9, 16926.5),
    "SeaquestNoFrameskip-v4": (68.4, 42054.7),
}
# The game on which our algorithms and DQN are compared by the clock
RACE = "PongNoFrameskip-v4"
# From the Zoo's hyperparameters for Atari
DQN_LEARNING_STARTS = 100_000
# Means and standard deviations over the episodes of one training of 10 million agent steps each, from the Zoo's
# benchmark.md
ZOO_SCORES = {
    "PongNoFrameskip-v4": {
        "DQN": (20.602, 0.613),
        "QR-DQN": (20.492, 0.687),
        "A2C": (17.292, 3.214),
        "PPO": (20.989, 0.105),
    },
    "BreakoutNoFrameskip-v4": {
        "DQN": (358.327, 61.981),
        "QR-DQN": (393.6, 79.828),
        "A2C": (279.793, 122.177),
        "PPO": (398.033, 33.328),
    },
    "SpaceInvadersNoFrameskip-v4": {
        "DQN": (622.742, 201.564),
        "QR-DQN": (1899.928, 823.488),
        "A2C": (627.16, 201.974),
        "PPO": (960.331, 425.355),
    },
    "QbertNoFrameskip-v4": {
        "DQN": (9496.774, 5399.633),
        "QR-DQN": (14799.728, 2917.629),
        "A2C": (3882.345, 1223.327),
        "PPO": (15627.108, 3313.538),
    },
    "BeamRiderNoFrameskip-v4": {
        "DQN": (4295.946, 1790.458),
        "QR-DQN": (17122.941, 10769.997),
        "A2C": (2890.298, 1379.137),
        "PPO": (3397.0, 1662.368),
    },
    "SeaquestNoFrameskip-v4": {
        "DQN": (2000.29, 606.644),
        "QR-DQN": (2557.576, 76.951),
        "A2C": (1721.493, 105.339),
        "PPO": (1783.636, 34.096),
    },
}
# Agent steps of a whole training on Atari, by the Zoo and here
ATARI_STEPS = 10_000_000
MINATAR = ("Breakout", "Asterix", "Freeway", "SpaceInvaders", "Seaquest")
# Names of the algorithms by their ids in the Zoo: ours, and the one that they are compared with
NAMES = {algo: algorithm.name for algo, algorithm in ALGORITHMS.items()} | {"dqn": "DQN", "a2c": "A2C"}
# Table 2 of the paper: speed-up by several actor-learners, each on a core of its own, over a single one
PAPER_SPEEDUPS = {
    "async_one_step_q": (1.0, 3.0, 6.3, 13.3, 24.1),
    "async_one_step_sarsa": (1.0, 2.8, 5.9, 13.1, 22.1),
    "async_n_step_q": (1.0, 2.7, 5.9, 10.7, 17.2),
    "a3c": (1.0, 2.1, 3.7, 6.9, 12.5),
}

Runs = dict[str, dict[str, list[Run]]]


def read_runs(folder: Path = RESULTS) -> Runs:
    """
    :param folder: folder of the results
    :return: the runs by environment and algorithm
    """
    runs: Runs = {}
    for path in sorted(folder.glob("*/*.json")):
        algo = path.stem.rsplit("_", 1)[0]
        runs.setdefault(path.parent.name, {}).setdefault(algo, []).append(Run(**json.loads(path.read_text())))
    return runs


def read_throughput(folder: Path = RESULTS) -> dict[str, Any]:
    """
    :param folder: folder of the results
    :return: the results of ``benchmarks/throughput.py``
    """
    return json.loads((folder / "throughput.json").read_text())


def read_node_kills(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """
    :param folder: folder of the results
    :return: the results of ``benchmarks/node_kills.py``, none if it has not run
    """
    path = folder / "node_kills.json"
    return json.loads(path.read_text()) if path.exists() else []


def first_to_reach(run: Run, threshold: float) -> tuple[float, float]:
    """
    :param run: a run
    :param threshold: mean return
    :return: agent steps and seconds to the first checkpoint (or the last model) that reached it, infinite if none did
    """
    returns = [*run.curve_returns, float(np.mean(run.final_returns))]
    moments = zip([*run.curve_steps, run.n_steps], [*run.curve_seconds, run.seconds], strict=True)
    reached = (moment for value, moment in zip(returns, moments, strict=True) if value >= threshold)
    return next(reached, (float("inf"), float("inf")))


def seconds_to(run: Run, threshold: float) -> float:
    """
    :param run: a run
    :param threshold: mean return
    :return: seconds until the first checkpoint (or the last model) that reached it, infinite if none did
    """
    return first_to_reach(run, threshold)[1]


def normalize(env_id: str, score: float) -> float:
    """
    :param env_id: id of an Atari game
    :param score: a score in it
    :return: the human-normalised score: 0 for that of random play, 1 for that of a human tester
    """
    random_score, human_score = RANDOM_AND_HUMAN_SCORES[env_id]
    return (score - random_score) / (human_score - random_score)


def read_seed(run: Run) -> str:
    """
    :param run: a run
    :return: the seed in its command
    """
    return run.command.split("--seed ")[1].split()[0]


def median_speeds(contenders: dict[str, dict[str, Any]]) -> dict[str, float]:
    """
    :param contenders: the measurements of each contender, see :func:`speed_table`
    :return: median of the agent steps per second of each contender
    """
    return {name: statistics.median(contender["steps_per_second"]) for name, contender in contenders.items()}
