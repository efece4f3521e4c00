"""The command line: the Zoo's own, with our algorithms and hyperparameters."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import optuna
import pytest
import torch as th
import yaml
from huggingface_hub.errors import EntryNotFoundError
from rl_zoo3 import ALGOS
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER, convert_offpolicy_params
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_async1step import A3C, AsyncNStepQ, AsyncOneStepQ, AsyncOneStepSarsa, MinAtarCNN, RayVecEnv
from sb3_async1step.common.optimizers import OPTIMIZERS
from sb3_async1step.registry import ALGORITHMS, Algorithm
from sb3_async1step.value_based.algorithm import ValueBasedAlgorithm
from sb3_async1step.value_based.search_space import NET_ARCHS
from sb3_async1step.zoo import (
    AsyncExperimentManager,
    cli,
    experiment_manager,
    hyperparams_path,
    main,
    register,
    trained_agents_path,
)
from tests.command_line import call_main, call_zoo
from tests.helpers import DEADLINE, FOREVER, trained_parameters

PROGRAM = str(Path(sys.executable).parent / "sb3-async1step")


def run(arguments, cwd, code=0):
    """``sb3-async1step`` with these arguments; returns what it printed."""
    actual, output = call_zoo(["sb3-async1step", *arguments.split()], cwd)
    assert actual == code, output
    return output


def run_program(*command, cwd):
    """Run a program on a fresh process; returns what it printed."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def load_entry(algo, env_id):
    """Hyperparameters of the YAML file."""
    return yaml.safe_load(Path(hyperparams_path(algo)).read_text())[env_id]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_train_and_enjoy(algo, tmp_path):
    run(
        f"train --algo {algo} --env CartPole-v1 -n 2000 --seed 3 --eval-freq 1000 --n-eval-envs 1 --progress "
        "--save-freq 1000 -params update_interval:3 max_grad_norm:1.5",
        cwd=tmp_path,
    )
    folder = tmp_path / "logs" / algo / "CartPole-v1_1"
    files = {path.name for path in folder.iterdir()}
    # The Zoo divides its frequencies by the number of envs
    n_envs = load_entry(algo, "CartPole-v1")["n_envs"]
    every = 1000 // n_envs * n_envs
    checkpoints = {f"rl_model_{every}_steps.zip", f"rl_model_{2 * every}_steps.zip"}
    assert {"CartPole-v1.zip", "best_model.zip", "evaluations.npz", "0.monitor.csv"} | checkpoints <= files
    model_class = ALGORITHMS[algo].model_class
    model = model_class.load(folder / "CartPole-v1.zip")
    assert type(model) is model_class
    assert (model.update_interval, model.max_grad_norm, model.num_timesteps) == (3, 1.5, -(-2000 // n_envs) * n_envs)
    for which in ("--load-best", "--load-last-checkpoint"):
        out = run(f"enjoy --algo {algo} --env CartPole-v1 -f logs -n 300 --no-render {which}", cwd=tmp_path)
        assert "Mean reward" in out


def test_more_options_of_enjoy(tmp_path, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    run("train --algo async_one_step_q --env CartPole-v1 -n 500 --eval-freq -1 --save-freq 64", cwd=tmp_path)
    enjoy = "enjoy --algo async_one_step_q --env CartPole-v1 -f logs"
    # With a window, which shows 50 frames in a second
    assert "Mean reward" in run(f"{enjoy} -n 40 --load-checkpoint 64 --stochastic", cwd=tmp_path)
    run(f"{enjoy} -n 100 --no-render --n-envs 2 --reward-log rewards --norm-reward", cwd=tmp_path)
    assert (tmp_path / "rewards" / "0.monitor.csv").read_text().count("\n") > 2


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_continued_training_goes_on_where_it_was(algo, tmp_path):
    """Exploration and learning rate follow the steps of both runs; the Zoo alone would start both again."""
    model_class = ALGORITHMS[algo].model_class
    explores = issubclass(model_class, ValueBasedAlgorithm)
    exploration = " exploration_fraction:1.0 exploration_final_eps:0.1" if explores else ""
    train = (
        f"train --algo {algo} --env CartPole-v1 --eval-freq -1 -params n_envs:4 learning_rate:'lin_2e-3'{exploration}"
    )
    logs = tmp_path / "logs" / algo
    run(f"{train} -n 400", cwd=tmp_path)
    model = model_class.load(logs / "CartPole-v1_1" / "CartPole-v1.zip")
    assert (model.num_timesteps, model.policy.optimizer.param_groups[0]["lr"]) == (400, 0.0)
    run(f"{train} -n 1200 --save-freq 400 -i {logs}/CartPole-v1_1/CartPole-v1.zip", cwd=tmp_path)
    for steps, progress in [(800, 0.5), (1200, 0.75), (1600, 1.0)]:
        model = model_class.load(logs / "CartPole-v1_2" / f"rl_model_{steps}_steps.zip")
        assert model.num_timesteps == steps
        # What is saved in a callback follows from the steps before this call
        if explores:
            assert model.exploration_rate == pytest.approx(1.0 - 0.9 * progress, abs=0.01)
        assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3 * (1 - progress), abs=2e-5)
    assert "learn" not in vars(model)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_weights_of_a_continued_training(algo, tmp_path):
    train = f"train --algo {algo} --env CartPole-v1 --eval-freq -1 -n 400"
    logs = tmp_path / "logs" / algo
    run(train, cwd=tmp_path)
    trained = logs / "CartPole-v1_1" / "CartPole-v1.zip"
    # Without learning, the weights remain those that were loaded
    run(f"{train} -i {trained} -params learning_rate:0.0", cwd=tmp_path)
    before, after = (
        trained_parameters(ALGORITHMS[algo].model_class.load(path))
        for path in (trained, logs / "CartPole-v1_2" / "CartPole-v1.zip")
    )
    assert all(th.equal(p, q) for p, q in zip(before, after, strict=True))


@pytest.mark.parametrize("vec_env", ["dummy", "subproc", "healing"])
def test_a_preempted_training_is_saved(vec_env, tmp_path, monkeypatch):
    """SIGTERM ends it, and may end the env's processes, too."""

    class Terminate(BaseCallback):
        def _on_step(self):
            if self.num_timesteps >= 100:
                processes = getattr(self.training_env.unwrapped, "processes", [])
                for process in processes:
                    process.terminate()
                    process.join(DEADLINE)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(FOREVER)
            return True

    monkeypatch.setattr(sys.modules["tests.test_zoo"], "Terminate", Terminate, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    code, output = call_zoo(
        [
            *f"sb3-async1step train --algo a3c --env CartPole-v1 -n 1000000 --eval-freq -1 --vec-env {vec_env}".split(),
            *("-params", "n_envs:2", "callback:'tests.test_zoo.Terminate'"),
        ],
        tmp_path,
    )
    assert code == 0, output
    assert signal.getsignal(signal.SIGTERM) is before
    model = A3C.load(tmp_path / "logs" / "a3c" / "CartPole-v1_1" / "CartPole-v1.zip")
    assert model.num_timesteps == 100


def test_the_zoos_own_algorithms_work_too(tmp_path):
    run("train --algo dqn --env CartPole-v1 -n 500 --eval-freq -1", cwd=tmp_path)
    assert (tmp_path / "logs" / "dqn" / "CartPole-v1_1" / "CartPole-v1.zip").exists()


def test_a_config_file_of_the_users(tmp_path):
    (tmp_path / "mine.yml").write_text("CartPole-v1: {n_timesteps: 40, policy: MlpPolicy, n_envs: 2, gamma: 0.5}")
    run("train --algo async_one_step_sarsa --env CartPole-v1 -conf mine.yml --eval-freq -1", cwd=tmp_path)
    model = AsyncOneStepSarsa.load(tmp_path / "logs" / "async_one_step_sarsa" / "CartPole-v1_1" / "CartPole-v1.zip")
    assert (model.num_timesteps, model.gamma) == (40, 0.5)


def test_optimize(tmp_path):
    """Trials in two threads, pruning, a study in a database."""
    optimize = (
        "train --algo async_one_step_sarsa --env CartPole-v1 -n 600 -optimize --n-trials 4 --n-jobs 2 "
        "--n-startup-trials 1 --n-evaluations 2 --sampler tpe --pruner median "
        "--study-name study --storage sqlite:///study.db"
    )
    assert "Number of finished trials:  4" in run(optimize, cwd=tmp_path)
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path}/study.db")
    assert len(study.trials) == 4
    assert {trial.state.name for trial in study.trials} <= {"COMPLETE", "PRUNED"}
    assert study.best_value > 0
    assert set(study.best_params) == {
        "one_minus_gamma", "learning_rate", "update_interval", "target_update_interval", "exploration_fraction",
        "exploration_final_eps", "max_grad_norm", "loss", "optimizer", "net_arch", "layer_norm",
    }  # fmt: skip
    # Not the first one: the Zoo takes a --trial-id of 0 for none
    params = study.trials[3].params
    run(
        "train --algo async_one_step_sarsa --env CartPole-v1 -n 100 --study-name study --storage sqlite:///study.db "
        "--trial-id 3 --eval-freq -1",
        cwd=tmp_path,
    )
    (file,) = (tmp_path / "logs" / "async_one_step_sarsa").glob("CartPole-v1_*/CartPole-v1.zip")
    model = AsyncOneStepSarsa.load(file)
    assert model.gamma == 1 - params["one_minus_gamma"]
    assert model.learning_rate(1.0) == params["learning_rate"] and model.learning_rate(0.0) == 0.0
    assert isinstance(model.policy.optimizer, OPTIMIZERS[params["optimizer"]])
    assert any(isinstance(module, th.nn.LayerNorm) for module in model.q_net.modules()) == params["layer_norm"]


@pytest.mark.parametrize("algo", sorted(set(ALGORITHMS) - {"async_one_step_sarsa"}))
def test_a_trial_of_each_search_space(algo, tmp_path):
    optimize = "-optimize --n-trials 1 --n-evaluations 1 --no-optim-plots"
    out = run(f"train --algo {algo} --env CartPole-v1 -n 100 {optimize}", cwd=tmp_path)
    assert "Number of finished trials:  1" in out


def test_trials_have_the_network_of_their_entry(tmp_path):
    """What is not sampled of the policy: its features extractor."""
    train = "train --algo async_n_step_q --env MinAtar/Breakout-v0 -n 40 --eval-freq -1 -params n_envs:2 "
    study = "--study-name study --storage sqlite:///study.db"
    out = run(f"{train} {study} -optimize --n-trials 2 --n-evaluations 1 --no-optim-plots", cwd=tmp_path)
    assert "Number of finished trials:  2" in out
    params = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path}/study.db").trials[1].params
    run(f"{train} {study} --trial-id 1", cwd=tmp_path)
    (path,) = tmp_path.glob("logs/async_n_step_q/MinAtar-Breakout-v0_*/MinAtar-Breakout-v0.zip")
    policy = AsyncNStepQ.load(path).policy
    assert policy.features_extractor_class is MinAtarCNN
    assert policy.net_arch == NET_ARCHS[params["net_arch"]]
    assert type(policy.optimizer) is OPTIMIZERS[params["optimizer"]]


def test_a_continued_training_has_a_log_of_its_own(tmp_path):
    """Not the latest one of another training."""
    train = "train --algo a3c --env CartPole-v1 -n 100 --eval-freq -1 -tb tb"
    run(f"{train} --seed 1", cwd=tmp_path)
    run(f"{train} --seed 2", cwd=tmp_path)
    folders = tmp_path / "tb" / "CartPole-v1"
    before = {path: path.stat().st_size for path in folders.rglob("events*")}
    run(f"{train} -i logs/a3c/CartPole-v1_1/CartPole-v1.zip", cwd=tmp_path)
    assert sorted(path.name for path in folders.iterdir()) == ["A3C_1", "A3C_2", "A3C_3"]
    assert {path: path.stat().st_size for path in before} == before


def test_checkpoints_have_their_statistics(tmp_path, recwarn):
    """As if the training had been killed after the first one: the Zoo alone saves statistics at the end."""
    train = "train --algo a3c --env CartPole-v1 --eval-freq -1 -params n_envs:4 normalize:True"
    run(f"{train} -n 400 --save-freq 200", cwd=tmp_path)
    folder = tmp_path / "logs" / "a3c" / "CartPole-v1_1"
    end = load_statistics(folder / "CartPole-v1" / "vecnormalize.pkl")
    assert end.obs_rms.count == pytest.approx(404, abs=1)
    out = run(f"{train} -n 4 -i {folder}/rl_model_200_steps.zip", cwd=tmp_path)
    assert "Loading saved VecNormalize stats" in out
    continued = load_statistics(tmp_path / "logs" / "a3c" / "CartPole-v1_2" / "CartPole-v1" / "vecnormalize.pkl")
    # The env is reset, and steps once
    assert continued.obs_rms.count == pytest.approx(204 + 8, abs=1)
    assert not [warning for warning in recwarn if "no statistics" in str(warning.message)]
    (folder / "CartPole-v1" / "vecnormalize.pkl").unlink()
    enjoy = "enjoy --algo a3c --env CartPole-v1 --exp-id 1 -f logs --no-render -n 20"
    assert "Loading running average" in run(f"{enjoy} --load-checkpoint 200", cwd=tmp_path)
    assert "vecnormalize.pkl not found" in run(enjoy, cwd=tmp_path, code=1)
    with pytest.warns(UserWarning, match="There are no statistics of VecNormalize beside .*/CartPole-v1.zip"):
        run(f"{train} -n 4 -i {folder}/CartPole-v1.zip", cwd=tmp_path)


def test_a_normalized_agent_goes_on_in_an_entry_without_normalization(tmp_path):
    train = "train --algo a3c --env CartPole-v1 -n 100 --eval-freq 50 --n-eval-envs 1 -params n_envs:4"
    run(f"{train} normalize:'dict(norm_obs=True,norm_reward=False)'", cwd=tmp_path)
    logs = tmp_path / "logs" / "a3c"
    for first, second in ((1, 2), (2, 3)):
        run(f"{train} -i {logs}/CartPole-v1_{first}/CartPole-v1.zip", cwd=tmp_path)
        folder = logs / f"CartPole-v1_{second}" / "CartPole-v1"
        statistics = load_statistics(folder / "vecnormalize.pkl")
        # The env is reset each time
        assert statistics.obs_rms.count == pytest.approx(104 * second, abs=1)
        entry = yaml.unsafe_load((folder / "config.yml").read_text())
        assert entry["normalize"] == "dict(norm_obs=True, norm_reward=False)"
    out = run("enjoy --algo a3c --env CartPole-v1 -f logs --no-render -n 20", cwd=tmp_path)
    assert "Loading running average" in out


@pytest.mark.parametrize(
    ("checkpoint", "statistics"),
    [
        ("rl_model_200_steps.zip", "rl_model_vecnormalize_200_steps.pkl"),
        ("foo_200_steps.zip", "foo_vecnormalize_200_steps.pkl"),
        ("foo_200_steps.zip", None),
        ("best_model.zip", None),
        ("CartPole-v1.zip", None),
    ],
)
def test_statistics_of_a_checkpoint(checkpoint, statistics, tmp_path):
    for name in (checkpoint, "best_model.pkl", "CartPole-v1.pkl", statistics):
        if name is not None:
            (tmp_path / name).touch()
    expected = None if statistics is None else tmp_path / statistics
    assert experiment_manager.find_statistics(tmp_path / checkpoint) == expected


def load_statistics(path):
    return VecNormalize.load(str(path), make_vec_env("CartPole-v1"))


@pytest.mark.parametrize(
    ("optimizes", "arguments", "on_ray"),
    [
        (False, {}, True),
        (False, {"eval_env": True}, False),
        (True, {}, False),
        (True, {"no_log": True}, True),
        (True, {"eval_env": True}, False),
    ],
)
def test_envs_of_trials_and_evaluations_are_on_this_machine(optimizes, arguments, on_ray, monkeypatch):
    """But for those that learn. Trials on several threads share the manager."""
    made = []
    monkeypatch.setattr(
        experiment_manager.ExperimentManager, "create_envs", lambda manager, *args: made.append(manager.vec_env_class)
    )
    manager = AsyncExperimentManager.__new__(AsyncExperimentManager)
    manager.vec_env_class, manager.vec_env_kwargs = RayVecEnv, {"n_nodes": 2}
    manager.optimize_hyperparameters = optimizes
    manager.create_envs(2, **arguments)
    assert made == [RayVecEnv if on_ray else DummyVecEnv]
    assert manager.vec_env_class is RayVecEnv and manager.vec_env_kwargs == {"n_nodes": 2}


@pytest.mark.slow
def test_benchmark_of_an_env_with_a_slash_in_its_id(tmp_path):
    shutil.copytree(Path(trained_agents_path()) / "async_one_step_q", tmp_path / "logs" / "async_one_step_q")
    for other in ("CartPole-v1_1", "LunarLander-v3_1"):
        shutil.rmtree(tmp_path / "logs" / "async_one_step_q" / other)
    for _ in range(2):
        run("benchmark --log-dir logs --benchmark-dir scores --no-hub -n 300", cwd=tmp_path)
    assert "|MinAtar-SpaceInvaders-v0|" in (tmp_path / "scores" / "benchmark.md").read_text().replace(" ", "")


def test_more_options_of_train(tmp_path):
    run(
        "train --algo async_one_step_sarsa --env CartPole-v1 -n 400 --eval-freq -1 --vec-env subproc -uuid "
        "--env-kwargs sutton_barto_reward:True -params n_envs:2 n_workers:2",
        cwd=tmp_path,
    )
    (folder,) = (tmp_path / "logs" / "async_one_step_sarsa").glob("CartPole-v1_1_*-*")
    assert AsyncOneStepSarsa.load(folder / "CartPole-v1.zip").num_timesteps == 400
    assert read_args(folder)["vec_env"] == "subproc"
    # Of both lanes: one may have made nearly all of the steps
    assert set(load_results(str(folder))["r"]) == {-1.0}
    assert "install W&B" in run("train --algo async_one_step_q --env CartPole-v1 --track", cwd=tmp_path, code=1)


def read_args(folder):
    (path,) = folder.glob("*/args.yml")
    return yaml.unsafe_load(path.read_text())


def test_atari_in_the_engine(tmp_path):
    run(
        "train --algo async_one_step_q --env PongNoFrameskip-v4 -n 200 --eval-freq 100 --eval-episodes 1 --vec-env ale "
        "-params n_envs:4 --env-kwargs repeat_action_probability:0.25 max_num_frames_per_episode:600",
        cwd=tmp_path,
    )
    folder = tmp_path / "logs" / "async_one_step_q" / "PongNoFrameskip-v4_1"
    assert AsyncOneStepQ.load(folder / "PongNoFrameskip-v4.zip").num_timesteps == 200
    assert "t_start" in (folder / "3.monitor.csv").read_text()
    assert (read_args(folder)["vec_env"], read_args(folder)["vec_env_kwargs"]) == ("ale", {})
    wrong = run("train --algo async_one_step_q --env CartPole-v1 --vec-env ale", cwd=tmp_path, code=2)
    assert "AleVecEnv can't replace this env" in wrong


def test_minatar(tmp_path):
    run("train --algo async_one_step_sarsa --env MinAtar/Breakout-v0 -n 2000 --eval-freq -1", cwd=tmp_path)
    (path,) = tmp_path.glob("logs/async_one_step_sarsa/MinAtar-Breakout-v0_1/*.zip")
    assert isinstance(AsyncOneStepSarsa.load(path).q_net.features_extractor, MinAtarCNN)
    out = run("enjoy --algo async_one_step_sarsa --env MinAtar/Breakout-v0 -f logs -n 300 --no-render", cwd=tmp_path)
    assert "Mean reward" in out


def test_pictures_of_minatar(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sb3-async1step", "record_video", "--env", "MinAtar/Breakout-v0"])
    # Once for each command
    for _ in range(2):
        cli.register_minatar()
    env = gym.make("MinAtar/Breakout-v0", render_mode="rgb_array")
    env.reset(seed=0)
    image = env.render()
    assert (image.shape, image.dtype) == ((160, 160, 3), np.uint8)
    assert image.max() > 100
    # Each field is a square of one colour
    squares = image.reshape(10, 16, 10, 16, 3)
    assert (squares == squares[:, :1, :, :1]).all()
    assert gym.make("MinAtar/Breakout-v0", render_mode="array").unwrapped.render().shape == (10, 10, 4)


def test_minatar_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "minatar.gym", None)
    monkeypatch.setattr("sys.argv", ["sb3-async1step", "train", "--env", "MinAtar/Breakout-v0"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "pip install minatar" in capsys.readouterr().err


def test_videos(tmp_path):
    run("train --algo async_one_step_q --env CartPole-v1 -n 100 --eval-freq -1", cwd=tmp_path)
    run("record_video --algo async_one_step_q --env CartPole-v1 -f logs -n 20", cwd=tmp_path)
    (video,) = tmp_path.glob("logs/async_one_step_q/CartPole-v1_1/videos/*.mp4")
    assert video.stat().st_size > 1000
    # Without -f, an agent that comes with the package
    files_of_package = set(Path(trained_agents_path()).rglob("*"))
    for option, folder in (("", "videos"), ("-o elsewhere", "elsewhere")):
        run(f"record_video --algo a3c --env CartPole-v1 -n 20 {option}", cwd=tmp_path)
        (video,) = tmp_path.glob(f"{folder}/*.mp4")
        assert video.stat().st_size > 1000
    assert set(Path(trained_agents_path()).rglob("*")) == files_of_package


class FakeHub:
    """A hub in a folder."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, **kwargs):
        return f"hub/{repo_id}"

    def snapshot_download(self, repo_id, local_dir):
        local_dir.mkdir(parents=True)

    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.folder / repo_id)

    def download(self, repo_id, filename, **kwargs):
        path = self.folder / repo_id / filename
        if not path.exists():
            raise EntryNotFoundError(f"no {filename}")
        return str(path)


@pytest.mark.parametrize("normalize", [False, True])
def test_to_the_hub_and_back(normalize, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub_of_others")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
    names = "--algo async_one_step_q --env CartPole-v1 -orga us"
    options = f"-n 100 --eval-freq -1 -params normalize:{normalize}"
    run(f"train --algo async_one_step_q --env CartPole-v1 {options}", cwd=tmp_path)
    monkeypatch.setattr("sys.argv", f"sb3-async1step push_to_hub {names} -f logs --no-render".split())
    main()
    card = (hub.folder / "us" / "async_one_step_q-CartPole-v1" / "README.md").read_text()
    assert "**AsyncOneStepQ** Agent playing **CartPole-v1**" in card
    assert "type: mean_reward" in card
    monkeypatch.setattr("sys.argv", f"sb3-async1step load_from_hub {names} -f downloaded".split())
    main()
    pushed, loaded = (
        AsyncOneStepQ.load(f"{folder}/async_one_step_q/CartPole-v1_1/CartPole-v1.zip")
        for folder in ("logs", "downloaded")
    )
    assert all(th.equal(a, b) for a, b in zip(pushed.q_net.parameters(), loaded.q_net.parameters(), strict=True))
    statistics = "async_one_step_q/CartPole-v1_1/CartPole-v1/vecnormalize.pkl"
    assert [Path(folder, statistics).exists() for folder in ("logs", "downloaded")] == [normalize, normalize]


# ---------------------------------------------------------------------- search spaces

#: A trial of the value-based methods
VALUES = {
    "one_minus_gamma": 0.02, "learning_rate": 1e-3, "update_interval": 4, "target_update_interval": 500,
    "exploration_fraction": 0.2, "exploration_final_eps": 0.1, "max_grad_norm": 1.0, "loss": "huber",
    "optimizer": "adam", "net_arch": "medium", "layer_norm": True,
}  # fmt: skip


def sample(algo, trial):
    """As ``train -optimize`` does."""
    register()
    return HYPERPARAMS_SAMPLER[algo](trial=trial, n_actions=2, n_envs=4, additional_args={})


@pytest.mark.parametrize(
    ("algo", "own"), [("async_one_step_q", {}), ("async_one_step_sarsa", {}), ("async_n_step_q", {"q_lambda": 0.5})]
)
def test_samples_of_the_value_based_methods(algo, own):
    hyperparams = sample(algo, optuna.trial.FixedTrial(VALUES | own))
    learning_rate = hyperparams.pop("learning_rate")
    assert [learning_rate(progress) for progress in (1.0, 0.5, 0.0)] == [1e-3, 5e-4, 0.0]
    assert hyperparams == {
        "gamma": 0.98, "update_interval": 4, "target_update_interval": 500, "exploration_fraction": 0.2,
        "exploration_final_eps": 0.1, "max_grad_norm": 1.0, "loss": "huber",
        "policy_kwargs": {"net_arch": [256, 256], "layer_norm": True, "optimizer_class": th.optim.Adam}, **own,
    }  # fmt: skip


def test_samples_of_a3c():
    values = {
        "one_minus_gamma": 0.02, "one_minus_gae_lambda": 0.0625, "update_interval": 8, "learning_rate": 1e-3,
        "ent_coef": 0.01, "vf_coef": 0.5, "normalize_advantage": True, "max_grad_norm": 1.0, "rms_prop_eps": 1e-3,
        "net_arch": "small", "activation_fn": "relu", "optimizer": "adam",
    }  # fmt: skip
    hyperparams = sample("a3c", optuna.trial.FixedTrial(values))
    learning_rate = hyperparams.pop("learning_rate")
    assert [learning_rate(progress) for progress in (1.0, 0.5, 0.0)] == [1e-3, 5e-4, 0.0]
    assert hyperparams == {
        "gamma": 0.98, "gae_lambda": 0.9375, "update_interval": 8, "ent_coef": 0.01, "vf_coef": 0.5,
        "normalize_advantage": True, "max_grad_norm": 1.0, "rms_prop_eps": 1e-3,
        "policy_kwargs": {"net_arch": [64, 64], "activation_fn": th.nn.ReLU, "optimizer_class": th.optim.Adam},
    }  # fmt: skip


@pytest.mark.parametrize("net_arch", NET_ARCHS)
def test_sizes_of_networks_are_called_as_in_the_zoo(net_arch):
    values = {"one_minus_gamma": 0.1, "net_arch": net_arch}
    assert convert_offpolicy_params(values)["policy_kwargs"] == {"net_arch": NET_ARCHS[net_arch]}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_samples_are_arguments_of_the_constructor(algo):
    """And what is read from a study's database, where only the values are, gives the same model."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(5):
        trial = study.ask()
        sampled = sample(algo, trial)
        model = ALGORITHMS[algo].model_class("MlpPolicy", "CartPole-v1", **sampled)
        converted = HYPERPARAMS_CONVERTER[algo](trial.params)
        assert converted.pop("learning_rate") == f"lin_{model.learning_rate(1.0)}"
        del sampled["learning_rate"]
        assert converted == sampled


# ---------------------------------------------------------------------- the registry


class Newcomer(AsyncOneStepQ):
    """An algorithm that somebody adds."""


def sample_gamma(trial):
    return {"one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.25, 0.25)}


def convert_gamma(sampled):
    return {"gamma": 1 - sampled["one_minus_gamma"]}


def test_an_entry_of_the_registry_is_all_that_the_commands_need(tmp_path, monkeypatch):
    """``train`` and its ``-optimize`` know an algorithm by its entry and its YAML file."""
    for registry in (ALGOS, HYPERPARAMS_SAMPLER, HYPERPARAMS_CONVERTER):
        # So that it is removed at the end
        monkeypatch.setitem(registry, "newcomer", None)
    monkeypatch.setitem(ALGORITHMS, "newcomer", Algorithm(Newcomer, sample_gamma, convert_gamma))
    assert ALGORITHMS["newcomer"].name == "Newcomer"
    assert Path(hyperparams_path("newcomer")) == Path(hyperparams_path("async_one_step_q")).with_name("newcomer.yml")
    monkeypatch.setattr(experiment_manager, "find_folder", lambda name: tmp_path)
    (tmp_path / "newcomer.yml").write_text("CartPole-v1: {n_timesteps: 40, policy: MlpPolicy, n_envs: 2, gamma: 0.5}")
    assert "newcomer" in run("--help", cwd=tmp_path)
    train = "train --algo newcomer --env CartPole-v1"
    run(f"{train} --eval-freq -1", cwd=tmp_path)
    model = Newcomer.load(tmp_path / "logs" / "newcomer" / "CartPole-v1_1" / "CartPole-v1.zip")
    assert (type(model), model.num_timesteps, model.gamma) == (Newcomer, 40, 0.5)
    optimize = "-optimize --n-trials 1 --n-evaluations 1 --no-optim-plots"
    assert "one_minus_gamma: 0.25" in run(f"{train} {optimize}", cwd=tmp_path)
    assert sample("newcomer", optuna.trial.FixedTrial({"one_minus_gamma": 0.25})) == {"gamma": 0.75}


def test_benchmark_and_plots(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    algo = "async_one_step_q"
    run(f"train --algo {algo} --env CartPole-v1 -n 1000 --eval-freq 500 --n-eval-envs 1", cwd=tmp_path)
    out = run("benchmark --log-dir logs --no-hub -n 300 --benchmark-dir scores --test-mode", cwd=tmp_path)
    assert f"{algo}|CartPole-v1" in (tmp_path / "scores" / "benchmark.md").read_text(), out
    assert algo.upper() in run(f"all_plots -a {algo} -e CartPole-v1 -f logs --no-display -o scores/all", cwd=tmp_path)
    run(f"plot_train -a {algo} -e CartPole-v1 -f logs", cwd=tmp_path)
    asked = []
    monkeypatch.setattr("rl_zoo3.plots.plot_train", lambda: asked.extend(sys.argv[1:]))
    run("plot_train -a a3c -e MinAtar/Breakout-v0 CartPole-v1 -f logs", cwd=tmp_path)
    assert asked == ["-a", "a3c", "-e", "MinAtar-Breakout-v0", "CartPole-v1", "-f", "logs"]
    asked.clear()
    run("plot_train -a a3c --env=MinAtar/Breakout-v0 -f logs/MinAtar/runs", cwd=tmp_path)
    assert asked == ["-a", "a3c", "--env=MinAtar-Breakout-v0", "-f", "logs/MinAtar/runs"]


TRAINED_AGENTS = sorted(Path(trained_agents_path()).glob("*/*_1"))


@pytest.mark.parametrize("folder", TRAINED_AGENTS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_trained_agents_play(folder, tmp_path):
    name = folder.name.removesuffix("_1")
    env_id = yaml.unsafe_load((folder / name / "args.yml").read_text())["env"]
    if env_id.startswith("LunarLander"):
        pytest.importorskip("Box2D", reason="LunarLander needs sb3-async1step[box2d]")
    out = run(f"enjoy --algo {folder.parent.name} --env {env_id} -n 20 --no-render", cwd=tmp_path)
    assert f"Loading {folder / name}.zip" in out


def test_trained_agents_are_few_and_say_nothing_of_where_they_were_trained():
    files = [path for path in Path(trained_agents_path()).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".zip", ".yml", ".pkl"}
    assert sum(path.stat().st_size for path in files) < 12e6
    for path in files:
        contents = [path.read_bytes()]
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                contents = [archive.read(name) for name in archive.namelist()]
        assert not any(re.search(rb"/(home|root|tmp|Users)/", content) for content in contents), path


def test_other_folders_of_agents_are_the_users(tmp_path):
    """``enjoy`` looks among the agents of this package for our algorithms alone, and if no folder is given."""
    ours = ["--algo", "a3c", "--env", "CartPole-v1"]
    assert cli.find_agents(ours) == [*ours, "--folder", trained_agents_path()]
    for arguments in ([*ours, "-f", "logs"], [*ours, "--folder=logs"], ["--algo", "ppo"], []):
        assert cli.find_agents(arguments) == arguments
    for command in (
        "enjoy --algo async_one_step_q --env MountainCar-v0 --no-render",
        "enjoy --algo a3c --env CartPole-v1 --no-render -f nowhere",
    ):
        out = run(command, cwd=tmp_path, code=2)
        assert re.search(r"No model found|folder was not found", out) and "Traceback" not in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("", "a command is missing, choose from: train, enjoy"),
        ("tain", "unknown command 'tain', choose from: train, enjoy"),
        ("train --algo async_one_step_r", "invalid choice: 'async_one_step_r'"),
        ("train --algo async_one_step_q --env CartPole-v9", "you maybe meant CartPole-v1"),
        ("train --algo async_one_step_q --env Blackjack-v1", "Hyperparameters not found for async_one_step_q"),
        ("train --algo a3c --vec-env subprocess", "(choose from 'dummy', 'subproc', 'ale', 'healing', 'ray')"),
        ("train --algo a3c --vec-env-kwargs start_method:\"'fork'\"", "DummyVecEnv got an unexpected keyword argument"),
        ("train --algo a3c --vec-env healing --vec-env-kwargs n:1", "HealingVecEnv got an unexpected keyword argument"),
        ("train --algo a3c --vec-env ray -optimize --n-jobs 2", "trials run one after another: leave --n-jobs out"),
        ("train --algo a3c --vec-env ray -optimize --n-jobs -1", "trials run one after another: leave --n-jobs out"),
        ("train --algo a3c -params learning_rate:lin_1e-3", "'lin_1e' is not defined. Values are Python, where a text"),
        ("train --algo a3c -params n_workers:auto net_arch:[", "'auto' is not defined"),
        ("train --algo a3c -params net_arch:[", "'[' was never closed"),
        ("train --algo a3c -params learning_rate=0.1", "Values are Python, where a text"),
        ("train --algo a3c --vec-e subproc", "ambiguous option: --vec-e could match --vec-env, --vec-env-kwargs"),
    ],
)
def test_wrong_commands(arguments, problem, tmp_path):
    out = run(arguments, cwd=tmp_path, code=2)
    assert problem in out
    assert "Traceback" not in out


@pytest.mark.parametrize(
    "code",
    [
        # A conf file in Python is executed by the Zoo
        "hyperparams = {'CartPole-v1': {'n_timesteps': 20, 'policy': missing}}",
        # The constructor of a dataclass is made from a string
        """
import dataclasses

@dataclasses.dataclass
class Size:
    n: int

    def __post_init__(self):
        missing

Size(1)
""",
    ],
)
def test_errors_in_code_of_the_users_have_a_traceback(code, tmp_path):
    (tmp_path / "conf.py").write_text(code)
    out = run("train --algo a3c --env CartPole-v1 --conf-file conf.py", cwd=tmp_path, code=1)
    assert "Traceback" in out and "NameError: name 'missing' is not defined" in out


def test_help(tmp_path):
    help_page = run("--help", cwd=tmp_path)
    assert all(algo in help_page for algo in ALGORITHMS)
    help_of_train = run("train --help", cwd=tmp_path)
    assert "--optimize-hyperparameters" in help_of_train
    assert "--vec-env {dummy,subproc,ale,healing,ray}" in help_of_train and "--vec-env-kwargs" in help_of_train
    # A script of the Zoo's knows our algorithms
    assert "async_one_step_q" in run("record_video --help", cwd=tmp_path)
    # As "python -m sb3_async1step.zoo" does
    module = partial(runpy.run_module, "sb3_async1step.zoo", run_name="__main__")
    code, out = call_main(module, ["__main__.py", "enjoy", "--help"], tmp_path)
    assert code == 0 and out.startswith("usage: sb3-async1step enjoy") and "--load-best" in out


def test_programs_train(tmp_path):
    """On fresh processes, on which nothing has registered anything: the commands above are called on this one."""
    options = ["--algo", "async_one_step_q", "--env", "CartPole-v1", "-n", "64", "--eval-freq", "-1"]
    run_program(PROGRAM, "train", *options, cwd=tmp_path)
    assert (tmp_path / "logs" / "async_one_step_q" / "CartPole-v1_1" / "CartPole-v1.zip").exists()


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_hyperparameters(algo):
    entries = yaml.safe_load(Path(hyperparams_path(algo)).read_text())
    assert {"atari", "CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MinAtar/Breakout-v0"} <= set(entries)
    for entry in entries.values():
        assert {"n_timesteps", "policy", "n_envs"} <= set(entry)
