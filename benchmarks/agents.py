"""
Choose the agents in ``trained_agents`` among the trainings of ``benchmarks.learning`` whose logs are on this machine:
of each algorithm and env, the last model of the training with the highest mean return.

``python -m benchmarks.agents --logs logs/benchmarks``
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import yaml
from rl_zoo3 import ALGOS

from benchmarks.learning import RESULTS, Run, find_parts
from sb3_async1step.zoo import register, trained_agents_path


def list_trainings(logs: Path, results: Path) -> dict[tuple[str, str], list[tuple[float, Path]]]:
    """
    :param logs: folder of the Zoo's logs
    :param results: folder of the figures
    :return: the mean return and the logs of each training, by algorithm and by the name of its env's files
    """
    trainings: dict[tuple[str, str], list[tuple[float, Path]]] = {}
    for folder in sorted(logs.glob("*/*")):
        path = results / folder.relative_to(logs).with_suffix(".json")
        if path.exists():
            run = Run(**json.loads(path.read_text()))
            key = folder.name.rsplit("_", 1)[0], folder.parent.name
            trainings.setdefault(key, []).append((float(np.mean(run.final_returns)), folder))
    return trainings


def copy_agent(folder: Path, algo: str, name: str, agents: Path) -> None:
    """
    :param folder: the Zoo's logs of a training
    :param algo: name of the algorithm in the Zoo
    :param name: name of the env's files
    :param agents: where to put its last model and its settings, as the Zoo's ``enjoy`` expects them
    """
    part = find_parts(folder)[-1]
    target = agents / algo / f"{name}_1"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(part / name, target / name)
    # Where the logs were is nobody's business
    (target / name / "command.txt").unlink(missing_ok=True)
    settings = target / name / "args.yml"
    options = yaml.unsafe_load(settings.read_text())
    settings.write_text(yaml.dump({**options, "log_folder": "logs"}))
    model = ALGOS[algo].load(part / f"{name}.zip", device="cpu")
    # Who goes on training begins with new ones. They are half of the file
    model.policy.optimizer.state.clear()
    model.save(target / f"{name}.zip")


def main() -> None:
    """Replace the agents of which there are trainings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, default=Path("logs/benchmarks"), help="folder of the Zoo's logs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    parser.add_argument("--envs", nargs="+", help="names of the envs' files, by default of all")
    parser.add_argument("--agents", type=Path, default=Path(trained_agents_path()), help="folder of the agents")
    arguments = parser.parse_args()
    register()
    print("| env | algorithm | mean return | seed |\n|---|---|---|---|")
    for (algo, name), trainings in list_trainings(arguments.logs, arguments.results).items():
        if arguments.envs and name not in arguments.envs:
            continue
        mean, folder = max(trainings)
        copy_agent(folder, algo, name, arguments.agents)
        print(f"| {name} | `{algo}` | {mean:.1f} | {folder.name.rsplit('_', 1)[1]} |")


if __name__ == "__main__":
    main()
