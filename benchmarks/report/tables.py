"""Makes tables in Markdown of the results."""

import statistics
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.actor_learners import N_ACTOR_LEARNERS
from benchmarks.report.formats import (
    format_best,
    format_count,
    format_moment,
    format_score,
    format_seconds,
    format_spread,
)
from benchmarks.report.results import (
    ATARI,
    ATARI_STEPS,
    DEFAULTS_THRESHOLDS,
    DQN_LEARNING_STARTS,
    MINATAR,
    NAMES,
    PAPER_SPEEDUPS,
    RACE,
    THRESHOLDS,
    ZOO_SCORES,
    Runs,
    first_to_reach,
    median_speeds,
    normalize,
    read_seed,
    seconds_to,
)
from sb3_async1step.registry import ALGORITHMS


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
        for algo, name in NAMES.items():
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
    algos = [algo for algo in NAMES if any(algo in runs.get(env_id, {}) for env_id in THRESHOLDS)]
    lines = [
        f"| environment (threshold) | {' | '.join(NAMES[algo] for algo in algos)} |",
        "|---|" + "---|" * len(algos),
    ]
    for env_id, threshold in THRESHOLDS.items():
        groups = [runs.get(env_id, {}).get(algo, []) for algo in algos]
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
        for algo, name in NAMES.items():
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
        "| game | algorithm | seed | mean return | human-normalised | last five checkpoints | million steps | hours "
        "| million steps (hours) to a mean return of |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for env_id, thresholds in ATARI.items():
        for algo, name in NAMES.items():
            for run in runs.get(env_id, {}).get(algo, []):
                mean = float(np.mean(run.final_returns))
                cells = [env_id, name, read_seed(run), f"{mean:.1f} ± {np.std(run.final_returns):.1f}"]
                cells += [f"{normalize(env_id, mean):.0%}", f"{np.mean(run.curve_returns[-5:]):.1f}"]
                cells += [f"{run.n_steps / 1e6:.1f}", f"{run.seconds / 3600:.1f}"]
                cells += ["; ".join(format_moment(run, threshold) for threshold in thresholds)]
                lines.append(f"| {' | '.join(cells)} |")
        if env_id in runs:
            for name, (mean, deviation) in ZOO_SCORES[env_id].items():
                cells = [env_id, f"{name}, published by the Zoo", "", f"{mean:.1f} ± {deviation:.1f}"]
                cells += [f"{normalize(env_id, mean):.0%}", "", "10.0", "", ""]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def short_atari_table(runs: Runs) -> list[str]:
    """
    :param runs: all runs
    :return: lines of a table in Markdown: scores of whole trainings, beside those that the Zoo publishes
    """
    games = [env_id for env_id in ATARI if env_id in runs]
    names = [game.removesuffix("NoFrameskip-v4") for game in games]
    lines = [f"| algorithm | {' | '.join(names)} | human-normalised median |", "|---|---|" + "---|" * len(games)]
    for algo, name in NAMES.items():
        scores = {}
        for game in games:
            if group := [run for run in runs[game].get(algo, []) if run.n_steps >= ATARI_STEPS]:
                scores[game] = float(np.mean([np.mean(run.final_returns) for run in group]))
        if scores:
            lines.append(_short_atari_row(name, games, scores))
    for name in ZOO_SCORES[RACE]:
        scores = {game: ZOO_SCORES[game][name][0] for game in games}
        lines.append(_short_atari_row(f"{name}, published by the Zoo", games, scores))
    return lines


def _short_atari_row(name: str, games: list[str], scores: dict[str, float]) -> str:
    # Over fewer games, it could not be compared
    is_whole = len(scores) == len(games)
    median = f"{statistics.median(normalize(game, scores[game]) for game in games):.0%}" if is_whole else ""
    cells = [f"{scores[game]:.1f}" if game in scores else "" for game in games]
    return f"| {' | '.join([name, *cells, median])} |"


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
    ours = [(name, run) for algo, name in NAMES.items() if algo in ALGORITHMS for run in groups.get(algo, [])]
    for name, run in ours:
        _, seconds = first_to_reach(run, goal)
        if not np.isfinite(seconds):
            continue
        n_steps = DQN_LEARNING_STARTS + seconds * dqn_speed
        best = "; ".join(format_best(dqn, n_steps) for dqn in groups.get("dqn", []))
        cells = [name, read_seed(run), f"{seconds / 60:.0f}", format_count(n_steps), best]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


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
        for algo, name in NAMES.items():
            if group := runs.get(env_id, {}).get(algo):
                scores = [float(np.mean(run.final_returns)) for run in group]
                n_reached = sum(score >= threshold for score in scores)
                lines.append(
                    f"| {env_id} ({threshold:g}) | {name} | {', '.join(f'{score:.1f}' for score in scores)} "
                    f"| {n_reached} of {len(scores)} | {format_count(group[0].n_steps)} "
                    f"| {statistics.median(run.seconds for run in group):.0f} |"
                )
    return lines


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
                cells = [env_id, NAMES[algo], n_lanes, layout, several.seed.nunique()]
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
    lines = [f"| | steps/s | x {reference} | CPU µs per step | MiB |", "|---|---|---|---|---|"]
    medians = median_speeds(contenders)
    for name, contender in contenders.items():
        speed = format_spread(contender["steps_per_second"])
        # Not measured before 2026-11-26
        cpu = format_count(statistics.median(contender["cpu_microseconds"])) if "cpu_microseconds" in contender else ""
        memory = format_count(contender["peak_memory_mib"])
        lines.append(f"| {name} | {speed} | {medians[name] / medians[reference]:.2f} | {cpu} | {memory} |")
    return lines


def limits_table(limits: dict[str, float], contenders: dict[str, dict[str, Any]]) -> list[str]:
    """
    :param limits: agent steps per second that the machine could make at best, by contender
    :param contenders: see :func:`speed_table`
    :return: lines of a table in Markdown
    """
    lines = ["| | limit, steps/s | reached |", "|---|---|---|"]
    medians = median_speeds(contenders)
    return lines + [
        f"| {name} | {format_count(limit)} | {medians[name] / limit:.0%} |" for name, limit in limits.items()
    ]


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
        "Atari in short": short_atari_table(runs),
    }


def make_speed_tables(throughput: dict[str, Any]) -> dict[str, list[str]]:
    """
    :param throughput: the results of ``benchmarks/throughput.py``
    :return: the lines of its tables by the names of their marks
    """
    tables = {
        name: speed_table(throughput[name], reference=next(iter(throughput[name])))
        for name in ("contenders", "actor-critics", "workers", "lanes", *THRESHOLDS)
        if name in throughput
    }
    autos = {name: comparison for name, comparison in throughput.items() if name.startswith("auto, ")}
    if autos:
        tables["auto"] = auto_table(autos)
    # They are measured beside the contenders
    if "contenders" in throughput:
        tables["limits"] = limits_table(throughput["limits"], throughput["contenders"])
        tables["floor"] = floor_table(throughput["floor"])
    return tables


def node_kills_table(trainings: list[dict[str, Any]]) -> list[str]:
    """
    :param trainings: the results of ``benchmarks/node_kills.py``
    :return: lines of a table in Markdown
    """
    lines = [
        "| agent steps | trainings | kills | reached their steps | mean return | of each training | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for n_steps in sorted({training["total_timesteps"] for training in trainings}):
        group = [training for training in trainings if training["total_timesteps"] == n_steps]
        scores = [float(np.mean(training["returns"])) for training in group]
        n_complete = sum(training["num_timesteps"] >= n_steps and not training.get("failure") for training in group)
        lines.append(
            f"| {format_count(n_steps)} | {len(group)} | {sum(len(training['kills']) for training in group)} "
            f"| {n_complete} | {np.mean(scores):.1f} ± {np.std(scores):.1f} "
            f"| {', '.join(f'{score:.0f}' for score in scores)} "
            f"| {format_spread([training['seconds'] for training in group])} |"
        )
    return lines
