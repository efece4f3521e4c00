"""Trainings on a small Ray cluster on this machine. Its processes take up to a minute to start if that is busy."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_async1step import A3C, AsyncOneStepQ, RayVecEnv
from sb3_async1step.nodes.settings import ExchangeSettings
from sb3_async1step.sb3_internals import start_ray_on_loopback
from tests.helpers import DEADLINE, are_equal, wait_until, weights_of

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'sb3-async1step[ray]'")

from benchmarks.node_kills import get_process_id  # noqa: E402 (imports ray)


@pytest.fixture(scope="module")
def cluster():
    """One for all tests of this file."""
    start_ray_on_loopback(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def lanes(cluster):
    """Four lanes on two nodes, whose processes take seconds to start."""
    env = make_vec_env("CartPole-v1", 4, vec_env_cls=RayVecEnv, vec_env_kwargs={"n_nodes": 2, "node_timeout": None})
    yield env
    env.close()


@pytest.fixture
def env(lanes):
    # All of them, since tests change some
    lanes.settings = ExchangeSettings(sync_interval=20, checkpoint_interval=0.5, node_timeout=None)
    return lanes


class Keep(KVWriter):
    def __init__(self, logged):
        self._logged = logged

    def write(self, key_values, key_excluded, step=0):
        for key, value in key_values.items():
            self._logged[key] = max(value, self._logged.get(key, value))


class Record(BaseCallback):
    """Counts, and asks for nothing that stays on the nodes."""

    def __init__(self, at=None, action=None, stop_at=None):
        super().__init__()
        self.at, self.action, self.stop_at = at, action, stop_at
        self.lengths, self.episodes, self.seen = [], [], []

    def _on_step(self):
        dones, infos = self.locals["dones"], self.locals["infos"]
        assert len(dones) == len(infos) == self.training_env.num_envs
        self.lengths.append(len(dones))
        self.episodes += [infos[i]["episode"]["l"] for i in np.flatnonzero(dones)]
        assert all(info == {} for info, done in zip(infos, dones, strict=True) if not done)
        self.seen.append(self.num_timesteps)
        if self.at is not None and self.num_timesteps >= self.at:
            self.at = None
            self.action(self.model)
        return self.stop_at is None or self.num_timesteps < self.stop_at


def process_ids(env):
    return [get_process_id(node.actor) for node in env.nodes]


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_a_vec_env_like_any_other(env):
    env.seed(3)
    local = make_vec_env("CartPole-v1", 4)
    local.seed(3)
    np.testing.assert_array_equal(env.reset(), local.reset())
    actions = np.array([0, 1, 1, 0])
    for _ in range(30):
        mine, others = env.step(actions), local.step(actions)
        for one, two in zip(mine[:3], others[:3], strict=True):
            np.testing.assert_array_equal(one, two)
        assert [info.keys() for info in mine[3]] == [info.keys() for info in others[3]]
    env.set_attr("name", "x", indices=[1, 2])
    assert env.get_attr("name", indices=[2, 1]) == ["x", "x"]
    env.set_attr("name", "last", indices=-1)
    assert env.get_attr("name", indices=[-1, 3, -2]) == ["last", "last", "x"]
    for ask in (partial(env.get_attr, "name"), partial(env.set_attr, "name", "y")):
        with pytest.raises(IndexError):
            ask(indices=4)
    assert [spec.id for spec in env.get_attr("spec")] == ["CartPole-v1"] * 4
    assert env.env_is_wrapped(gym.wrappers.OrderEnforcing) == local.env_is_wrapped(gym.wrappers.OrderEnforcing)
    assert env.env_method("has_wrapper_attr", "nothing", indices=3) == [False]
    with pytest.raises(AttributeError, match="nothing"):
        env.get_attr("nothing")


def test_all_algorithms_count_every_step_once(algorithm, env, tmp_path):
    model = algorithm("MlpPolicy", env, seed=1)
    before, callback, logged = weights_of(model), Record(), {}
    model.set_logger(Logger(None, [Keep(logged)]))
    model.learn(200, [callback, CheckpointCallback(100, str(tmp_path))], log_interval=1)
    assert model.num_timesteps == 200 and callback.lengths == [4] * 50
    assert callback.seen == list(range(4, 201, 4))
    assert model._episode_num == len(callback.episodes) > 0
    assert sum(callback.episodes) <= 200
    assert not are_equal(before, weights_of(model))
    # Two lanes for each update, over update_interval steps
    assert model._n_updates == pytest.approx(200 / 2 / model.update_interval, abs=4)
    counts = {name: logged[f"ray/{name}"] for name in ("nodes", "node_restarts", "server_restarts", "dropped_pushes")}
    assert counts == {"nodes": 2, "node_restarts": 0, "server_restarts": 0, "dropped_pushes": 0}
    assert logged["ray/bytes_per_second"] > 0 and logged["ray/pull_seconds"] > 0 and "ray/staleness" in logged
    # An ordinary model, with or without Ray, which goes on
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 2))
    assert are_equal(weights_of(loaded), weights_of(model))
    loaded.learn(20, reset_num_timesteps=False)
    on_nodes = algorithm.load(tmp_path / "model", env=env)
    on_nodes.learn(40, reset_num_timesteps=False)
    assert loaded.num_timesteps == 220 and on_nodes.num_timesteps == 240
    evaluate_policy(model, env, 4)


def test_callbacks_stop_it_and_ask_for_what_there_is(env):
    def look(model):
        assert len(model.get_env().get_attr("spec")) == 4
        with pytest.raises(RuntimeError, match="stays on the nodes"):
            np.mean(callback.locals["rewards"])
        for name in ("gamma", "learning_rate", "lr_schedule"):
            with pytest.raises(RuntimeError, match=f"{name} can't be changed"):
                setattr(model, name, 0.5)
        with pytest.raises(RuntimeError, match="nobody else may step"):
            model.get_env().reset()

    model = AsyncOneStepQ("MlpPolicy", env)
    callback = Record(at=40, action=look, stop_at=100)
    model.learn(1_000_000, callback)
    assert model.num_timesteps == 100 and callback.at is None
    # The lanes are there for others
    assert env.reset().shape == (4, 4)


def test_killed_nodes_and_servers_are_replaced(env):
    def kill_both(model):
        kill(get_process_id(model._pool._server))
        kill(process_ids(env)[1])
        # By the process that takes its place
        assert len(model.get_env().get_attr("spec")) == 4

    restarts = []
    model = AsyncOneStepQ("MlpPolicy", env)
    callback = Record(at=400, action=kill_both)
    callback.on_training_end = lambda: restarts.append((model._pool._n_restarts, model._pool._n_server_restarts))
    model.learn(6_000, callback)
    assert model.num_timesteps == 6_000 and callback.seen == list(range(4, 6_001, 4))
    assert restarts == [(1, 1)]

    env.settings = replace(env.settings, max_restarts=0)
    callback = Record(at=400, action=lambda model: kill(process_ids(env)[0]))
    with pytest.raises(RuntimeError, match=r"Node 0 has ended .*, after max_restarts=0 restarts of nodes"):
        model.learn(1_000_000, callback)
    with pytest.raises(RuntimeError, match="another one has taken its place: reset the env"):
        env.env_method("reset")
    assert env.reset().shape == (4, 4)


@pytest.mark.slow
def test_the_server_applies_gradients(env, algorithm):
    """A new server goes on with the statistics of the last checkpoint."""
    env.settings = replace(env.settings, exchange="gradients", sync_interval=None)
    model = algorithm("MlpPolicy", env, seed=1, policy_kwargs={"optimizer_class": th.optim.Adam})
    before = weights_of(model)
    model.learn(200)
    assert model.num_timesteps == 200 and not are_equal(before, weights_of(model))
    # Each node has made an update for each exchange
    n_updates = [int(state["step"]) for state in model.policy.optimizer.state.values()]
    assert set(n_updates) == {model._n_updates} and model._n_updates == 100 / model.update_interval
    assert type(model.policy.optimizer) is th.optim.Adam

    def kill_server(model):
        kill(get_process_id(model._pool._server))

    callback = Record(at=1_000, action=kill_server)
    model.learn(3_000, callback, reset_num_timesteps=False)
    assert model.num_timesteps == 3_200 and callback.at is None
    n_updates = {int(state["step"]) for state in model.policy.optimizer.state.values()}
    assert 100 / model.update_interval < max(n_updates) <= model._n_updates


class Raises(gym.Wrapper):
    """The lane with the given number raises in its 20th step."""

    def step(self, action):
        self.n_steps = getattr(self, "n_steps", 0) + 1
        if self.n_steps == 20:
            raise ValueError("broken")
        return super().step(action)


class DictEnv(gym.Env):
    observation_space = gym.spaces.Dict(a=gym.spaces.Box(-9, 9, (2,), np.float32), b=gym.spaces.Discrete(3))
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self):
        self.n_steps = 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return {"a": np.array([3.0, 5.0], np.float32), "b": 1}, {}

    def step(self, action):
        self.n_steps += 1
        return {"a": np.array([3.0, 5.0], np.float32), "b": 1}, 2.0, False, self.n_steps % 10 == 0, {}


def test_the_exception_of_an_env_arrives_with_its_lane(cluster):
    env = make_vec_env(
        "CartPole-v1", 2, wrapper_class=Raises, vec_env_cls=RayVecEnv, vec_env_kwargs={"lanes_per_node": 2}
    )
    with pytest.raises(ValueError, match="broken") as caught:
        AsyncOneStepQ("MlpPolicy", env).learn(10_000)
    notes = "\n".join(caught.value.__notes__)
    assert (
        ", in step\n" in notes
        and "Raised in env lane 0" in notes
        and "node 0, where lanes 0 to 1 are lanes 0 to 1 of all lanes" in notes
    )
    env.close()
    env.close()


@pytest.mark.slow
def test_dict_observations_and_merged_statistics(cluster, tmp_path):
    base = RayVecEnv([DictEnv] * 4, n_nodes=2, sync_interval=10)
    env = VecNormalize(VecMonitor(base, str(tmp_path / "monitor.csv")), norm_obs_keys=["a"])
    model = A3C("MultiInputPolicy", env, seed=0)
    model.learn(400)
    statistics = model.get_vec_normalize_env().obs_rms["a"]
    # Every observation of every node, those of the reset included
    assert statistics.count == pytest.approx(400 + 4, abs=0.5)
    np.testing.assert_allclose(statistics.mean, [3.0, 5.0], rtol=1e-4)
    np.testing.assert_allclose(statistics.var, [0.0, 0.0], atol=1e-2)
    rows = (tmp_path / "monitor.csv").read_text().splitlines()[2:]
    # Each lane's last episode may not have ended
    assert 36 <= len(rows) == model._episode_num <= 40
    env.close()


class HangsOnce(gym.Wrapper):
    """One lane hangs in its 20th step, and leaves a file."""

    def __init__(self, env, path):
        super().__init__(env)
        self.path, self.n_steps = Path(path), 0

    def step(self, action):
        self.n_steps += 1
        if self.n_steps == 20 and not self.path.exists():
            self.path.touch()
            time.sleep(10 * DEADLINE)
        return super().step(action)


@pytest.mark.slow
@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_a_lane_that_hangs(vec_env_cls, cluster, tmp_path):
    path = tmp_path / "hung"
    options = {"n_nodes": 1, "vec_env_cls": vec_env_cls, "node_timeout": 5.0, "sync_interval": 4}
    env = make_vec_env(
        "CartPole-v1",
        2,
        wrapper_class=HangsOnce,
        wrapper_kwargs={"path": path},
        vec_env_cls=RayVecEnv,
        vec_env_kwargs=options,
    )
    restarts = []
    model, callback = AsyncOneStepQ("MlpPolicy", env), Record()
    callback.on_training_end = lambda: restarts.append(model._pool._n_restarts)
    model.learn(400, callback)
    assert model.num_timesteps == 400 and path.exists()
    # On a busy machine, a node that does not hang may be slow
    assert restarts[0] >= 1
    env.close()


@pytest.mark.slow
def test_frames_are_stacked_on_the_nodes(env):
    model = AsyncOneStepQ("MlpPolicy", VecFrameStack(env, 2))
    model.learn(40)
    assert model.observation_space.shape == (8,) and model.num_timesteps == 40


PROGRAM = """
import os, signal
import psutil, ray
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from sb3_async1step import AsyncOneStepQ, RayVecEnv

class Interrupt(BaseCallback):
    def _on_step(self):
        os.kill(os.getpid(), signal.SIGINT)
        return True

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    env = make_vec_env("CartPole-v1", 2, vec_env_cls=RayVecEnv, vec_env_kwargs=dict(lanes_per_node=2))
    processes = psutil.Process().children(recursive=True)
    ports = [c.laddr.ip for process in processes for c in process.net_connections() if c.status == "LISTEN"]
    assert ports and all(ip.endswith("127.0.0.1") for ip in ports), ports
    model = AsyncOneStepQ("MlpPolicy", env)
    try:
        model.learn(1_000_000, Interrupt())
    except KeyboardInterrupt:
        print("interrupted")
    # The lanes stay until the env is closed
    model.learn(1000)
    env.close()
    assert not ray.is_initialized()
    _, alive = psutil.wait_procs(processes, timeout=300)
    print(model.num_timesteps, alive)
"""


def without_a_cluster():
    """Environment variables with which a program starts its own."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def run_without_a_cluster(command, folder):
    """What a program has printed."""
    result = subprocess.run(
        command,
        cwd=folder, env=without_a_cluster(), capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_code(code, folder):
    """The last two lines that a program has printed."""
    (folder / "program.py").write_text(code)
    return run_without_a_cluster([sys.executable, "program.py"], folder).splitlines()[-2:]


@pytest.mark.slow
def test_nothing_is_left_of_a_cluster_of_our_own(tmp_path):
    assert run_code(PROGRAM, tmp_path) == ["interrupted", "1000 []"]


JOINS = """
import os
import ray
from ray.cluster_utils import Cluster
from stable_baselines3.common.env_util import make_vec_env
from sb3_async1step import AsyncOneStepQ, RayVecEnv

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    cluster.add_node(num_cpus=3)
    os.environ["RAY_ADDRESS"] = cluster.address
    env = make_vec_env("CartPole-v1", 8, vec_env_cls=RayVecEnv)
    assert [len(node.lanes) for node in env.nodes] == [6, 2]
    model = AsyncOneStepQ("MlpPolicy", env)
    model.learn(400)
    actors = ray._private.state.actors()
    where = [actors[node.actor._actor_id.hex()]["Address"]["NodeID"] for node in env.nodes]
    n_cpus = {node["NodeID"]: node["Resources"]["CPU"] for node in ray.nodes()}
    # The last node to take steps may have six lanes
    assert 400 <= model.num_timesteps < 408, model.num_timesteps
    print([n_cpus[machine] for machine in where])
    env.close()
    assert not ray.is_initialized()
    # The cluster is there for others
    ray.init(log_to_driver=False)
    print([node["Alive"] for node in ray.nodes()])
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.slow
def test_it_joins_a_cluster_and_leaves_it_running(tmp_path):
    """By default, each machine gets one node, and lanes by its CPUs."""
    assert run_code(JOINS, tmp_path) == ["[3.0, 1.0]", "[True, True]"]


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_and_its_training_goes_on(tmp_path):
    train = [
        sys.executable, "-m", "sb3_async1step.zoo", "train", "--algo", "async_one_step_q", "--env", "CartPole-v1",
        "--vec-env", "ray", "-params", "n_envs:2", "--save-freq", "1000", "--eval-freq", "-1", "-f", str(tmp_path),
    ]  # fmt: skip
    with (tmp_path / "output.txt").open("w") as output:
        driver = subprocess.Popen([*train, "-n", "100000000"], env=without_a_cluster(), stdout=output, stderr=output)
        wait_until(lambda: list(tmp_path.rglob("rl_model_*_steps.zip")))
        processes = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait()
    assert psutil.wait_procs(processes, timeout=DEADLINE)[1] == []
    checkpoint = max(tmp_path.rglob("rl_model_*_steps.zip"), key=lambda path: path.stat().st_mtime_ns)
    n_steps = AsyncOneStepQ.load(checkpoint).num_timesteps
    run_without_a_cluster([*train, "-n", "200", "-i", str(checkpoint)], tmp_path)
    assert AsyncOneStepQ.load(next(tmp_path.rglob("CartPole-v1_2/CartPole-v1.zip"))).num_timesteps == n_steps + 200
