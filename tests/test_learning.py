"""All algorithms learn, and they learn different things."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_async1step import AsyncOneStepQ, AsyncOneStepSarsa
from sb3_async1step.registry import ALGORITHMS
from tests.helpers import learns_identity


def test_identity(algorithm):
    """SB3's own test of learning, by four workers on threads."""
    env = DummyVecEnv([lambda: IdentityEnv(dim=4) for _ in range(4)])
    for i, lane in enumerate(env.envs):
        # From which it draws its states; the model's seed is that of the first lane's only
        lane.action_space.seed(i)
    model = algorithm("MlpPolicy", env, seed=0, n_workers=4, learning_rate=0.003, gamma=0.5, update_interval=5)
    assert learns_identity(model)


def make_cliff():
    return gym.wrappers.TimeLimit(gym.make("CliffWalking-v1"), max_episode_steps=100)


def walk_the_cliff(algorithm):
    """Returns of the greedy policy, and of the one that explores with epsilon 0.1 as in training."""
    # With one-hot observations and no hidden layer, the network is a table
    model = algorithm(
        "MlpPolicy", make_vec_env(make_cliff, 8, seed=0), seed=0, n_workers=1, learning_rate=0.05,
        update_interval=1,
        target_update_interval=100, exploration_initial_eps=0.1, exploration_final_eps=0.1, eval_eps=0.1,
        max_grad_norm=1e9, policy_kwargs={"net_arch": [], "optimizer_class": th.optim.Adam},
    )  # fmt: skip
    model.learn(50_000, log_interval=None)
    greedy, _ = evaluate_policy(model, make_vec_env(make_cliff, 1), n_eval_episodes=1)
    exploring, _ = evaluate_policy(model, make_vec_env(make_cliff, 8, seed=1), n_eval_episodes=200, deterministic=False)
    return greedy, exploring


@pytest.mark.slow
def test_sarsa_walks_away_from_the_cliff_and_q_learning_along_it():
    """Sutton & Barto 2018, example 6.6."""
    greedy_q, exploring_q = walk_the_cliff(AsyncOneStepQ)
    greedy_sarsa, exploring_sarsa = walk_the_cliff(AsyncOneStepSarsa)
    # The shortest path is along the cliff's edge: 13 steps
    assert greedy_q == -13
    assert -17 <= greedy_sarsa <= -15
    assert exploring_sarsa > exploring_q + 10


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["threads", "serial"])
@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_cartpole_in_the_zoo(algo, backend, tmp_path):
    """With the published hyperparameters."""
    command = [
        sys.executable,
        "-m",
        "sb3_async1step.zoo",
        "train",
        "--algo",
        algo,
        "--env",
        "CartPole-v1",
        "--seed",
        "1",
    ]
    subprocess.run([*command, "--eval-freq", "-1", "-params", f"backend:'{backend}'"], cwd=tmp_path, check=True)
    model = ALGORITHMS[algo].model_class.load(Path(tmp_path, "logs", algo, "CartPole-v1_1", "CartPole-v1.zip"))
    assert model.backend == backend
    mean_reward, _ = evaluate_policy(model, make_vec_env("CartPole-v1", 10, seed=1000), n_eval_episodes=100)
    assert mean_reward >= 475
