"""
Choose the agents in ``trained_agents`` among the trainings of ``benchmarks.learning`` whose logs are on this machine:
of each algorithm and env, the last model of the training with the highest mean return.

``python -m benchmarks.agents --logs logs/benchmarks``
"""

import argparse
import base64
import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import yaml
from rl_zoo3 import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.dqn.policies import DQNPolicy

from benchmarks.learning import RESULTS, Run, find_parts
from sb3_async1step.common.async_algorithm import STATE_OF_LANES
from sb3_async1step.workers.network_copies import share_memory
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


# With later ones, names have lengths
PROTOCOL_WITH_PLAIN_NAMES = 3


def rename_numpys_modules(pickled: bytes) -> bytes:
    """
    :param pickled: what NumPy 2 wrote, with a protocol up to 3
    :return: the same with names of modules that NumPy 1 knows as well
    """
    return pickled.replace(b"cnumpy._core.", b"cnumpy.core.")


def rename_in_model(data: bytes) -> bytes:
    """
    :param data: attributes of a model as SB3 saves them: JSON, some of it pickled
    :return: the same after :func:`rename_numpys_modules`
    """
    attributes = json.loads(data)
    for value in attributes.values():
        if isinstance(value, dict) and ":serialized:" in value:
            pickled = rename_numpys_modules(base64.b64decode(value[":serialized:"]))
            value[":serialized:"] = base64.b64encode(pickled).decode()
    return json.dumps(attributes, indent=4).encode()


def forget_generators(owner: BaseAlgorithm | VecNormalize) -> None:
    """
    NumPy 1 can't load random generators that 2 has written.

    :param owner: of spaces, which make new ones when they need them
    """
    for space in (owner.observation_space, owner.action_space):
        space._np_random = None  # type: ignore[assignment]


def share_target_parameters(policy: BasePolicy) -> None:
    """
    PyTorch writes tensors that share their memory once, which halves the file. Only a training needs an older target.

    :param policy: a policy, whose target network, if it has one, gets the parameters of the online network
    """
    if isinstance(policy, DQNPolicy):
        share_memory(policy.q_net_target.parameters(), policy.q_net.parameters())


def save_agent(model: BaseAlgorithm, path: Path) -> None:
    """
    :param model: a model
    :param path: of a file that plays, also with NumPy 1, but does not go on training exactly as the model would
    """
    model.policy.optimizer.state.clear()
    share_target_parameters(model.policy)
    forget_generators(model)
    file = io.BytesIO()
    with patch("cloudpickle.cloudpickle.DEFAULT_PROTOCOL", PROTOCOL_WITH_PLAIN_NAMES):
        model.save(file, exclude=STATE_OF_LANES)
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            contents = source.read(name)
            target.writestr(name, rename_in_model(contents) if name == "data" else contents)


def save_statistics(source: Path, env_id: str, target: Path) -> None:
    """
    :param source: a file of ``VecNormalize``
    :param env_id: id of the env
    :param target: a file with the same, which NumPy 1 can load as well
    """
    statistics = VecNormalize.load(str(source), make_vec_env(env_id))
    forget_generators(statistics)
    target.write_bytes(rename_numpys_modules(pickle.dumps(statistics, PROTOCOL_WITH_PLAIN_NAMES)))


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
    settings.write_text(yaml.dump({**options, "log_folder": "logs", "trained_agent": ""}))
    save_agent(ALGOS[algo].load(part / f"{name}.zip", device="cpu"), target / f"{name}.zip")
    statistics = target / name / "vecnormalize.pkl"
    if statistics.exists():
        save_statistics(statistics, options["env"], statistics)


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
