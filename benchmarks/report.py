"""
Make tables and pictures of all results in ``benchmarks/results``: ``make report``.

Tables are written between the marks ``<!-- NAME -->`` and ``<!-- end of NAME -->`` of the pages, pictures to
``docs/pictures``.
"""

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from benchmarks.actor_learners import LAYOUTS, N_ACTOR_LEARNERS, read_all
from benchmarks.learning import RESULTS, Run

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "guide" / "performance.md")

# Mean return that counts as having learned the task, by the name of the folder of results
THRESHOLDS = {"CartPole-v1": 475.0, "Acrobot-v1": -90.0, "MountainCar-v0": -120.0, "LunarLander-v3": 180.0}
# The same of the constructors' defaults
DEFAULTS_THRESHOLDS = {
    "CartPole-v1": 475.0,
    "Acrobot-v1": -100.0,
    "LunarLander-v3": 100.0,
    "MinAtar-Breakout-v0": 8.0,
    "PongNoFrameskip-v4": -10.0,
}
ATARI = {"PongNoFrameskip-v4": (0.0, 10.0, 18.0), "BreakoutNoFrameskip-v4": (10.0, 30.0, 100.0)}
# The game on which our algorithms and DQN are compared by the clock
RACE = "PongNoFrameskip-v4"
# From the Zoo's hyperparameters for Atari
DQN_LEARNING_STARTS = 100_000
# Means and standard deviations over the episodes of one training of 10 million agent steps each, from the Zoo's
# benchmark.md
ZOO_SCORES = {
    "PongNoFrameskip-v4": {"DQN": (20.602, 0.613), "A2C": (17.292, 3.214), "PPO": (20.989, 0.105)},
    "BreakoutNoFrameskip-v4": {"DQN": (358.327, 61.981), "A2C": (279.793, 122.177), "PPO": (398.033, 33.328)},
}
ZOO_LINES = {"DQN": "--", "A2C": "-.", "PPO": ":"}
MINATAR = ("Breakout", "Asterix", "Freeway", "SpaceInvaders", "Seaquest")
ALGORITHMS = {"async_one_step_q": "AsyncOneStepQ", "async_one_step_sarsa": "AsyncOneStepSarsa", "dqn": "DQN"}
COLOURS = {"async_one_step_q": "C0", "async_one_step_sarsa": "C1", "dqn": "C7"}
# Table 2 of the paper: speed-up by several actor-learners, each on a core of its own, over a single one
PAPER_SPEEDUPS = {
    "async_one_step_q": (1.0, 3.0, 6.3, 13.3, 24.1),
    "async_one_step_sarsa": (1.0, 2.8, 5.9, 13.1, 22.1),
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


def format_score(runs: Sequence[Run]) -> str:
    """
    :param runs: runs of one algorithm in one environment
    :return: mean ± standard deviation over the seeds of the last model's mean return
    """
    scores = [float(np.mean(run.final_returns)) for run in runs]
    return f"{np.mean(scores):.1f} ± {np.std(scores):.1f}"


def format_seconds(runs: Sequence[Run], threshold: float) -> str:
    """
    :param runs: runs of one algorithm in one environment
    :param threshold: mean return
    :return: median of the seconds until it was reached
    """
    median = statistics.median(seconds_to(run, threshold) for run in runs)
    return f"{median:.0f} s" if np.isfinite(median) else "not reached"


def format_count(number: float) -> str:
    """
    :param number: a large number
    :return: the rounded number, with spaces between groups of three digits
    """
    return f"{round(number):,}".replace(",", " ")


def classic_control_table(runs: Runs) -> list[str]:
    """
    :param runs: all runs
    :return: lines of a table in Markdown
    """
    lines = [
        "| environment | algorithm | seeds | mean return | agent steps | seconds | seconds to threshold | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for env_id, threshold in THRESHOLDS.items():
        for algo, name in ALGORITHMS.items():
            group = runs.get(env_id, {}).get(algo, [])
            if not group:
                continue
            n_reached = sum(np.isfinite(seconds_to(run, threshold)) for run in group)
            lines.append(
                f"| {env_id} | {name} | {len(group)} | {format_score(group)} | {format_count(group[0].n_steps)} "
                f"| {statistics.median(run.seconds for run in group):.0f} "
                f"| {format_seconds(group, threshold)} ({n_reached} of {len(group)} to {threshold:g}) "
                f"| {statistics.median(run.peak_memory_mib for run in group):.0f} |"
            )
    return lines


def short_table(runs: Runs) -> list[str]:
    """
    :param runs: all runs
    :return: lines of a table in Markdown: mean return and seconds to the threshold
    """
    lines = [
        f"| environment (threshold) | {' | '.join(ALGORITHMS.values())} |",
        "|---|" + "---|" * len(ALGORITHMS),
    ]
    for env_id, threshold in THRESHOLDS.items():
        groups = [runs.get(env_id, {}).get(algo, []) for algo in ALGORITHMS]
        cells = [f"{format_score(group)}; {format_seconds(group, threshold)}" if group else "" for group in groups]
        lines.append(f"| {env_id} ({threshold:g}) | {' | '.join(cells)} |")
    return lines


def minatar_table(runs: Runs) -> list[str]:
    """
    :param runs: all runs
    :return: lines of a table in Markdown
    """
    lines = ["| game | algorithm | seeds | mean return | frames | seconds |", "|---|---|---|---|---|---|"]
    for game in MINATAR:
        for algo, name in ALGORITHMS.items():
            group = runs.get(f"MinAtar-{game}-v0", {}).get(algo, [])
            if group:
                lines.append(
                    f"| {game} | {name} | {len(group)} | {format_score(group)} | {format_count(group[0].n_steps)} "
                    f"| {statistics.median(run.seconds for run in group):.0f} |"
                )
    return lines


def atari_table(runs: Runs) -> list[str]:
    """
    :param runs: all runs
    :return: lines of a table in Markdown, one for each training, and the Zoo's scores on the same games
    """
    lines = [
        "| game | algorithm | seed | mean return | million steps | hours | million steps (hours) to a mean return of |",
        "|---|---|---|---|---|---|---|",
    ]
    for env_id, thresholds in ATARI.items():
        for algo, name in ALGORITHMS.items():
            for run in runs.get(env_id, {}).get(algo, []):
                score = f"{np.mean(run.final_returns):.1f} ± {np.std(run.final_returns):.1f}"
                cells = [env_id, name, read_seed(run), score, f"{run.n_steps / 1e6:.1f}", f"{run.seconds / 3600:.1f}"]
                cells += ["; ".join(format_moment(run, threshold) for threshold in thresholds)]
                lines.append(f"| {' | '.join(cells)} |")
        if env_id in runs:
            for name, (mean, deviation) in ZOO_SCORES[env_id].items():
                lines.append(f"| {env_id} | {name}, published by the Zoo | | {mean:.1f} ± {deviation:.1f} | 10.0 | | |")
    return lines


def race_table(runs: Runs, throughput: dict[str, Any]) -> list[str]:
    """
    Compare how far DQN is on Pong when our algorithms have learned it. Since a machine is not equally fast on all days,
    DQN is given the steps that it makes in this time at the speed of the throughput benchmark. The steps before it
    begins to learn are free.

    :param runs: all runs
    :param throughput: the results of ``benchmarks/throughput.py``
    :return: lines of a table in Markdown, one for each training of our algorithms
    """
    groups = runs.get(RACE, {})
    goal = ATARI[RACE][-1]
    dqn_speed = median_speeds(throughput["contenders"])["DQN, 1 env"]
    lines = [f"| training | seed | minutes to {goal:g} | DQN's agent steps by then | its best mean return |"]
    lines += ["|---|---|---|---|---|"]
    ours = [(name, run) for algo, name in ALGORITHMS.items() if algo != "dqn" for run in groups.get(algo, [])]
    for name, run in ours:
        _, seconds = first_to_reach(run, goal)
        if not np.isfinite(seconds):
            continue
        n_steps = DQN_LEARNING_STARTS + seconds * dqn_speed
        best = "; ".join(format_best(dqn, n_steps) for dqn in groups.get("dqn", []))
        cells = [name, read_seed(run), f"{seconds / 60:.0f}", format_count(n_steps), best]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def format_best(run: Run, n_steps: float) -> str:
    """
    :param run: a run
    :param n_steps: number of agent steps
    :return: its seed and the best mean return of its checkpoints until then, and its length if that is shorter
    """
    best = max(value for steps, value in zip(run.curve_steps, run.curve_returns, strict=True) if steps <= n_steps)
    until = "" if n_steps <= run.n_steps else f" (until {format_count(run.n_steps)})"
    return f"seed {read_seed(run)}: {best:.1f}{until}"


def read_seed(run: Run) -> str:
    """
    :param run: a run
    :return: the seed in its command
    """
    return run.command.split("--seed ")[1].split()[0]


def format_moment(run: Run, threshold: float) -> str:
    """
    :param run: a run
    :param threshold: mean return
    :return: the threshold, and the steps and hours until it was reached
    """
    steps, seconds = first_to_reach(run, threshold)
    if not np.isfinite(steps):
        return f"{threshold:g}: not reached"
    return f"{threshold:g}: {steps / 1e6:.1f} ({seconds / 3600:.1f})"


def format_spread(values: list[float]) -> str:
    """
    :param values: a value for each repeat, infinite if the score was not reached
    :return: median, with the smallest and largest value in brackets
    """
    median, smallest, largest = (
        format_count(value) if np.isfinite(value) else "not reached"
        for value in (statistics.median(values), min(values), max(values))
    )
    return f"{median} ({smallest} to {largest})"


def actor_learners_table(studies: dict[tuple[str, str], pd.DataFrame]) -> list[str]:
    """
    :param studies: the measurements, see :func:`benchmarks.actor_learners.read_all`
    :return: lines of a table in Markdown
    """
    lines = [
        "| environment | algorithm | actor-learners | in | seeds | steps | gain | in the paper "
        "| seconds | faster | in the paper |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (env_id, algo), measurements in studies.items():
        alone = measurements[measurements.n_lanes == 1]
        for n_lanes, paper in zip(N_ACTOR_LEARNERS, PAPER_SPEEDUPS[algo], strict=True):
            for layout, several in measurements[measurements.n_lanes == n_lanes].groupby("layout", sort=False):
                cells = [env_id, ALGORITHMS[algo], n_lanes, layout, several.seed.nunique()]
                for figure, in_paper in (("steps", paper / n_lanes), ("seconds", paper)):
                    gain = alone[figure].median() / several[figure].median()
                    cells += [format_spread(several[figure].tolist())]
                    cells += [f"{gain:.2f}" if gain > 0 else "", f"{in_paper:.1f}"]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def speed_table(contenders: dict[str, dict[str, Any]], reference: str) -> list[str]:
    """
    :param contenders: the measurements of each contender, see :meth:`benchmarks.throughput.Contender.stop`
    :param reference: name of the contender that the others are compared with
    :return: lines of a table in Markdown: medians with the smallest and largest values, and ratios of the medians
    """
    lines = [f"| | steps/s | x {reference} | MiB |", "|---|---|---|---|"]
    medians = median_speeds(contenders)
    for name, contender in contenders.items():
        speed = format_spread(contender["steps_per_second"])
        memory = format_count(contender["peak_memory_mib"])
        lines.append(f"| {name} | {speed} | {medians[name] / medians[reference]:.2f} | {memory} |")
    return lines


def median_speeds(contenders: dict[str, dict[str, Any]]) -> dict[str, float]:
    """
    :param contenders: the measurements of each contender, see :func:`speed_table`
    :return: median of the agent steps per second of each contender
    """
    return {name: statistics.median(contender["steps_per_second"]) for name, contender in contenders.items()}


def floor_table(floor: dict[str, float]) -> list[str]:
    """
    :param floor: microseconds of each part of an agent step
    :return: lines of a table in Markdown
    """
    parts = [*floor.items(), ("together", sum(floor.values()))]
    lines = ["| part | microseconds per agent step |", "|---|---|"]
    return lines + [f"| {name} | {format_count(microseconds)} |" for name, microseconds in parts]


def auto_table(comparisons: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """
    :param comparisons: of ``n_workers="auto"`` with fixed settings, by "auto, ENV, N lanes"
    :return: the lines of a table, a row for each comparison
    """
    lines = ["| | `auto`, steps/s | best fixed setting, steps/s | ratio |", "|---|---|---|---|"]
    for name, contenders in comparisons.items():
        medians = median_speeds(contenders)
        auto = medians.pop("auto")
        best = max(medians, key=lambda setting: medians[setting])
        lines.append(
            f"| {name.removeprefix('auto, ')} | {format_spread(contenders['auto']['steps_per_second'])} "
            f"| {best}: {format_spread(contenders[best]['steps_per_second'])} | {auto / medians[best]:.2f} |"
        )
    return lines


def make_speed_tables(throughput: dict[str, Any]) -> dict[str, list[str]]:
    """
    :param throughput: the results of ``benchmarks/throughput.py``
    :return: the lines of its tables by the names of their marks
    """
    tables = {
        name: speed_table(throughput[name], reference=next(iter(throughput[name])))
        for name in ("contenders", "workers", "lanes", *THRESHOLDS)
        if name in throughput
    }
    autos = {name: comparison for name, comparison in throughput.items() if name.startswith("auto, ")}
    if autos:
        tables["auto"] = auto_table(autos)
    return {**tables, "floor": floor_table(throughput["floor"])}


def defaults_table(runs: Runs) -> list[str]:
    """
    :param runs: the runs of ``benchmarks/defaults.py``
    :return: lines of a table in Markdown: what the defaults learn, and in which time
    """
    lines = [
        "| environment (threshold) | algorithm | mean return of each seed | reached it | agent steps | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for env_id, threshold in DEFAULTS_THRESHOLDS.items():
        for algo, name in ALGORITHMS.items():
            if group := runs.get(env_id, {}).get(algo):
                scores = [float(np.mean(run.final_returns)) for run in group]
                n_reached = sum(score >= threshold for score in scores)
                lines.append(
                    f"| {env_id} ({threshold:g}) | {name} | {', '.join(f'{score:.1f}' for score in scores)} "
                    f"| {n_reached} of {len(scores)} | {format_count(group[0].n_steps)} "
                    f"| {statistics.median(run.seconds for run in group):.0f} |"
                )
    return lines


def draw_defaults(runs: Runs, path: Path) -> None:
    """
    Draw what the defaults learn on three environments, over time.

    :param runs: the runs of ``benchmarks/defaults.py``
    :param path: path of the picture
    """
    env_ids = [env_id for env_id in ("CartPole-v1", "Acrobot-v1", "LunarLander-v3") if env_id in runs]
    figure, axes = plt.subplots(1, len(env_ids), figsize=(4 * len(env_ids), 3.2), layout="constrained", squeeze=False)
    for axis, env_id in zip(axes[0], env_ids, strict=True):
        for algo, name in ALGORITHMS.items():
            if group := runs[env_id].get(algo):
                draw_mean(axis, [np.array(run.curve_seconds) for run in group], group, COLOURS[algo], name)
        axis.set(title=env_id, xlabel="seconds, with the defaults", ylabel="mean return")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def make_learning_tables(runs: Runs) -> dict[str, list[str]]:
    """
    :param runs: all runs
    :return: the lines of their tables by the names of their marks
    """
    return {
        "classic control": classic_control_table(runs),
        "classic control in short": short_table(runs),
        "MinAtar": minatar_table(runs),
        "Atari": atari_table(runs),
        "defaults": defaults_table(read_runs(RESULTS / "defaults")),
    }


def make_tables() -> dict[str, list[str]]:
    """
    :return: the lines of all tables by the names of their marks
    """
    runs, throughput = read_runs(), read_throughput()
    return {
        **make_learning_tables(runs),
        **make_speed_tables(throughput),
        "race": race_table(runs, throughput),
        "actor-learners": actor_learners_table(read_all()),
    }


def draw_speeds(throughput: dict[str, Any], path: Path) -> None:
    """
    Draw the speeds of the contenders, and the speed over the number of lanes.

    :param throughput: the results of ``benchmarks/throughput.py``
    :param path: path of the picture
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    contenders = median_speeds(throughput["contenders"])
    axes[0].barh(list(contenders), list(contenders.values()))
    axes[0].invert_yaxis()
    axes[0].set(xlabel="agent steps per second", title="Learning on Pong, Nature CNN")
    lanes = {int(name.split()[0]): speed for name, speed in median_speeds(throughput["lanes"]).items()}
    axes[1].plot(list(lanes), list(lanes.values()), marker="o")
    axes[1].set(xscale="log", xlabel="lanes", ylabel="agent steps per second", title="AleVecEnv, n_workers='auto'")
    axes[1].set_xticks(list(lanes), [str(n) for n in lanes])
    axes[1].minorticks_off()
    for axis in axes:
        axis.grid(alpha=0.3)
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
        axis.set(xscale="log", title=f"{env_id}\n{ALGORITHMS[algo]}", xlabel="actor-learners")
        axis.set_xticks(N_ACTOR_LEARNERS, [str(n_lanes) for n_lanes in N_ACTOR_LEARNERS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("gain in data efficiency")
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def draw_mean(axis: Axes, positions: list[np.ndarray], runs: list[Run], colour: str, label: str) -> None:
    """
    Draw the mean over the seeds and its 95 % confidence band.

    :param axis: axes to draw in
    :param positions: positions of the checkpoints of each run
    :param runs: runs of one algorithm
    :param colour: colour in Matplotlib's notation
    :param label: name of the algorithm
    """
    grid = np.linspace(max(p[0] for p in positions), min(p[-1] for p in positions), 50)
    curves = [np.interp(grid, p, run.curve_returns) for p, run in zip(positions, runs, strict=True)]
    mean = np.mean(curves, axis=0)
    # The confidence interval of the mean, from the standard deviation over the seeds
    band = 1.96 * np.std(curves, axis=0, ddof=min(1, len(curves) - 1)) / np.sqrt(len(curves))
    axis.plot(grid, mean, color=colour, label=f"{label}, {len(runs)} seeds")
    axis.fill_between(grid, mean - band, mean + band, color=colour, alpha=0.2, linewidth=0)


def draw_each(axis: Axes, positions: list[np.ndarray], runs: list[Run], colour: str, label: str) -> None:
    """
    Draw each run by itself, where there are too few seeds for a confidence band.

    :param axis: axes to draw in
    :param positions: positions of the checkpoints of each run
    :param runs: runs of one algorithm
    :param colour: colour in Matplotlib's notation
    :param label: name of the algorithm
    """
    for run_positions, run in zip(positions, runs, strict=True):
        axis.plot(run_positions, run.curve_returns, color=colour, label=label)
        label = ""


def draw_curves(env_id: str, groups: dict[str, list[Run]], path: Path) -> None:
    """
    Draw the learning curves over steps and over time, for Atari together with the scores that the Zoo publishes.

    :param env_id: id of the environment, which is the title
    :param groups: runs by algorithm
    :param path: path of the picture
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    draw, time_unit, seconds_in_it = (draw_each, "hours", 3600) if env_id in ATARI else (draw_mean, "seconds", 1)
    for algo, name in ALGORITHMS.items():
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
    axes[1].legend(fontsize="small")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def insert_table(text: str, name: str, lines: list[str]) -> str:
    """
    :param text: text of a page
    :param name: name of the marks
    :param lines: lines of the table
    :return: the text with the table between the marks, if it has them
    """
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
    table = "\n".join(lines)
    return re.sub(pattern, lambda marks: f"{marks[1]}{table}\n{marks[2]}", text, flags=re.DOTALL)


def main() -> None:
    """Write all tables and pictures."""
    tables = make_tables()
    for page in PAGES:
        text = page.read_text()
        for name, lines in tables.items():
            text = insert_table(text, name, lines)
        page.write_text(text)
    for env_id, groups in read_runs().items():
        draw_curves(env_id, groups, PICTURES / f"{env_id}.png")
    if defaults := read_runs(RESULTS / "defaults"):
        draw_defaults(defaults, PICTURES / "learning_curve.png")
    draw_speeds(read_throughput(), PICTURES / "throughput.png")
    if studies := read_all():
        draw_actor_learners(studies, PICTURES / "actor_learners.png")


if __name__ == "__main__":
    main()
