"""Draws the pictures of the results."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from benchmarks.actor_learners import LAYOUTS, N_ACTOR_LEARNERS
from benchmarks.learning import Run
from benchmarks.report.results import ATARI, NAMES, PAPER_SPEEDUPS, THRESHOLDS, ZOO_SCORES, Runs, median_speeds
from sb3_async1step.registry import ALGORITHMS

# Matplotlib's, in the order of the registry; DQN is grey
COLOURS = {algo: f"C{i}" for i, algo in enumerate(ALGORITHMS)} | {"dqn": "C7", "a2c": "C8"}
ZOO_LINES = {"DQN": "--", "QR-DQN": (0, (8, 2)), "A2C": "-.", "PPO": ":"}


def draw_curves(env_id: str, groups: dict[str, list[Run]], path: Path) -> None:
    """
    Draw the learning curves over steps and over time, for Atari together with the scores that the Zoo publishes.

    :param env_id: id of the environment, which is the title
    :param groups: runs by algorithm
    :param path: path of the picture
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    draw, time_unit, seconds_in_it = (draw_each, "hours", 3600) if env_id in ATARI else (draw_mean, "seconds", 1)
    for algo, name in NAMES.items():
        if algo not in groups:
            continue
        runs = groups[algo]
        for axis, attribute, unit in zip(axes, ("curve_steps", "curve_seconds"), (1, seconds_in_it), strict=True):
            positions = [np.array(getattr(run, attribute)) / unit for run in runs]
            draw(axis, positions, runs, COLOURS[algo], name)
    axes[0].set(xlabel="agent steps", ylabel="mean return", title=env_id)
    axes[1].set(xlabel=time_unit)
    for axis in axes:
        if env_id in THRESHOLDS:
            axis.axhline(THRESHOLDS[env_id], color="black", linewidth=0.8, linestyle=":")
        for name, (score, _) in ZOO_SCORES.get(env_id, {}).items():
            label = f"{name}, the Zoo's score"
            axis.axhline(score, color="black", linewidth=0.8, linestyle=ZOO_LINES[name], label=label)
        axis.grid(alpha=0.3)
    if env_id == "LunarLander-v3":
        # A crash in which the engines burn on costs thousands: one such checkpoint would flatten all curves
        axes[0].set_ylim(bottom=-500)
    axes[1].legend(fontsize="small")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def draw_mean(axis: Axes, positions: list[np.ndarray], runs: list[Run], colour: str, label: str) -> None:
    """
    Draw the mean over the seeds, and a band from the smallest to the largest return.

    :param axis: axes to draw in
    :param positions: positions of the checkpoints of each run
    :param runs: runs of one algorithm
    :param colour: colour in Matplotlib's notation
    :param label: name of the algorithm
    """
    grid = np.linspace(max(p[0] for p in positions), min(p[-1] for p in positions), 50)
    curves = [np.interp(grid, p, run.curve_returns) for p, run in zip(positions, runs, strict=True)]
    axis.plot(
        grid, np.mean(curves, axis=0), color=colour, label=f"{label}, {len(runs)} seed{'s' if len(runs) > 1 else ''}"
    )
    axis.fill_between(grid, np.min(curves, axis=0), np.max(curves, axis=0), color=colour, alpha=0.2, linewidth=0)


def draw_each(axis: Axes, positions: list[np.ndarray], runs: list[Run], colour: str, label: str) -> None:
    """
    Draw each run by itself, where there are one or two seeds.

    :param axis: axes to draw in
    :param positions: positions of the checkpoints of each run
    :param runs: runs of one algorithm
    :param colour: colour in Matplotlib's notation
    :param label: name of the algorithm
    """
    for run_positions, run in zip(positions, runs, strict=True):
        axis.plot(run_positions, run.curve_returns, color=colour, label=label)
        label = ""


def draw_defaults(runs: Runs, path: Path) -> None:
    """
    Draw what the defaults learn on three environments, over the agent's steps.

    :param runs: the runs of ``benchmarks/defaults.py``
    :param path: path of the picture
    """
    env_ids = [env_id for env_id in ("CartPole-v1", "Acrobot-v1", "LunarLander-v3") if env_id in runs]
    figure, axes = plt.subplots(1, len(env_ids), figsize=(4 * len(env_ids), 3.2), layout="constrained", squeeze=False)
    for axis, env_id in zip(axes[0], env_ids, strict=True):
        for algo, name in NAMES.items():
            if group := runs[env_id].get(algo):
                draw_mean(axis, [np.array(run.curve_steps) for run in group], group, COLOURS[algo], name)
        axis.set(title=env_id, xlabel="agent steps, with the defaults", ylabel="mean return")
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
        axis.xaxis.set_major_formatter(lambda steps, _: f"{steps / 1000:g}k")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def draw_speeds(throughput: dict[str, Any], path: Path) -> None:
    """
    Draw the speeds of the contenders, and the speed over the number of lanes.

    :param throughput: the results of ``benchmarks/throughput.py``
    :param path: path of the picture
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    contenders = median_speeds(throughput["contenders"])
    axes[0].barh([name.replace("`", "") for name in contenders], list(contenders.values()))
    axes[0].invert_yaxis()
    axes[0].set(xlabel="agent steps per second", title="Learning on Pong")
    lanes = {int(name.split()[0]): speed for name, speed in median_speeds(throughput["lanes"]).items()}
    axes[1].plot(list(lanes), list(lanes.values()), marker="o")
    axes[1].set(xscale="log", xlabel="lanes", ylabel="agent steps per second", title="Lanes of AleVecEnv")
    axes[1].set_xticks(list(lanes), [str(n) for n in lanes])
    axes[1].minorticks_off()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def draw_node_kills(training: dict[str, Any], path: Path) -> None:
    """
    Draw the learning curve of a training over time, and when a node, the server and a machine were killed.

    :param training: a result of ``benchmarks/node_kills.py``
    :param path: path of the picture
    """
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axis.plot(training["curve_seconds"], training["curve_returns"])
    for i, (victim, _, seconds) in enumerate(training["kills"]):
        axis.axvline(seconds, color=f"C{i + 1}", linestyle="--", label=f"{victim} killed")
    axis.set(xlabel="seconds", ylabel="mean return of 100 episodes", title=f"CartPole-v1, seed {training['seed']}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def draw_actor_learners(studies: dict[tuple[str, str], pd.DataFrame], path: Path) -> None:
    """
    Draw the gain in data efficiency: the median steps of one actor-learner divided by those of several, with the range
    over the seeds.

    :param studies: the measurements, see :func:`benchmarks.actor_learners.read_all`
    :param path: path of the picture
    """
    figure, axes = plt.subplots(1, len(studies), figsize=(3 * len(studies), 3.2), layout="constrained", squeeze=False)
    for axis, ((env_id, algo), measurements) in zip(axes[0], studies.items(), strict=True):
        alone = measurements.steps[measurements.n_lanes == 1].median()
        for layout in LAYOUTS:
            chosen = measurements[(measurements.layout == layout) | (measurements.n_lanes == 1)]
            gains = (alone / chosen.steps).groupby(chosen.n_lanes).agg(["median", "min", "max"])
            ranges = [gains["median"] - gains["min"], gains["max"] - gains["median"]]
            axis.errorbar(gains.index, gains["median"], ranges, marker="o", capsize=3, label=layout)
        paper = np.array(PAPER_SPEEDUPS[algo]) / N_ACTOR_LEARNERS
        axis.plot(N_ACTOR_LEARNERS, paper, color="black", linestyle=":", label="paper, 7 Atari games")
        axis.set(xscale="log", title=f"{env_id}\n{NAMES[algo]}", xlabel="actor-learners")
        axis.set_xticks(N_ACTOR_LEARNERS, [str(n_lanes) for n_lanes in N_ACTOR_LEARNERS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("gain in data efficiency")
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
