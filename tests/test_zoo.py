"""The command line: the Zoo's own, with our algorithms and hyperparameters."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch as th
import yaml

from sb3_async1step import AsyncOneStepQ, AsyncOneStepSarsa
from sb3_async1step.zoo import ALGORITHMS, hyperparams_path


def run(arguments, cwd, code=0):
    """``sb3-async1step`` with these arguments; returns what it printed."""
    command = [str(Path(sys.executable).parent / "sb3-async1step"), *arguments.split()]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=110, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_train_and_enjoy(algo, tmp_path):
    run(
        f"train --algo {algo} --env CartPole-v1 -n 2000 --seed 3 --eval-freq 1000 --n-eval-envs 1 --progress "
        "--save-freq 1000 -params update_interval:3 loss:'huber'",
        cwd=tmp_path,
    )
    folder = tmp_path / "logs" / algo / "CartPole-v1_1"
    files = {path.name for path in folder.iterdir()}
    # The Zoo divides its frequencies by the number of envs: 64
    checkpoints = {"rl_model_960_steps.zip", "rl_model_1920_steps.zip"}
    assert {"CartPole-v1.zip", "best_model.zip", "evaluations.npz", "0.monitor.csv"} | checkpoints <= files
    model = ALGORITHMS[algo].load(folder / "CartPole-v1.zip")
    assert type(model) is ALGORITHMS[algo]
    assert (model.update_interval, model.loss, model.gamma, model.num_timesteps) == (3, "huber", 0.99, 2048)
    for which in ("", "--load-best", "--load-last-checkpoint"):
        out = run(f"enjoy --algo {algo} --env CartPole-v1 -f logs -n 300 --no-render {which}", cwd=tmp_path)
        assert "Mean reward" in out


def test_continue_training(tmp_path):
    train = "train --algo async_one_step_q --env CartPole-v1 --eval-freq -1 -n 400"
    logs = tmp_path / "logs" / "async_one_step_q"
    run(train, cwd=tmp_path)
    trained = logs / "CartPole-v1_1" / "CartPole-v1.zip"
    # Without learning, the weights remain those that were loaded
    run(f"{train} -i {trained} -params learning_rate:0.0", cwd=tmp_path)
    before, after = (
        AsyncOneStepQ.load(path).q_net.state_dict() for path in (trained, logs / "CartPole-v1_2" / "CartPole-v1.zip")
    )
    assert all(th.equal(before[name], after[name]) for name in before)


def test_the_zoos_own_algorithms_work_too(tmp_path):
    run("train --algo dqn --env CartPole-v1 -n 500 --eval-freq -1", cwd=tmp_path)
    assert (tmp_path / "logs" / "dqn" / "CartPole-v1_1" / "CartPole-v1.zip").exists()


def test_a_config_file_of_the_users(tmp_path):
    (tmp_path / "mine.yml").write_text("CartPole-v1: {n_timesteps: 40, policy: MlpPolicy, n_envs: 2, gamma: 0.5}")
    run("train --algo async_one_step_sarsa --env CartPole-v1 -conf mine.yml --eval-freq -1", cwd=tmp_path)
    model = AsyncOneStepSarsa.load(tmp_path / "logs" / "async_one_step_sarsa" / "CartPole-v1_1" / "CartPole-v1.zip")
    assert (model.num_timesteps, model.gamma) == (40, 0.5)


@pytest.mark.parametrize(("arguments", "problem"), [("", "a command is missing"), ("tain", "unknown command 'tain'")])
def test_wrong_commands(arguments, problem, tmp_path):
    out = run(arguments, cwd=tmp_path, code=2)
    assert f"error: {problem}, choose from: train, enjoy" in out


def test_help(tmp_path):
    assert "async_one_step_sarsa" in run("--help", cwd=tmp_path)
    assert "--optimize-hyperparameters" in run("train --help", cwd=tmp_path)
    module = subprocess.run(
        [sys.executable, "-m", "sb3_async1step.zoo", "enjoy", "--help"], capture_output=True, text=True, check=True
    )
    assert "--load-best" in module.stdout


def test_the_library_does_not_need_the_zoo():
    code = "import sys, sb3_async1step; sys.exit(any(m in sys.modules for m in ('rl_zoo3', 'optuna', 'ale_py')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_hyperparameters(algo):
    entries = yaml.safe_load(Path(hyperparams_path(algo)).read_text())
    assert {"atari", "CartPole-v1"} <= set(entries)
    for entry in entries.values():
        assert {"n_timesteps", "policy", "n_envs"} <= set(entry)
