"""Lanes in processes of their own, each of which steps at its own pace."""

import multiprocessing
import os

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.envs import IdentityEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_async1step import A3C, AsyncNStepQ, AsyncOneStepQ, AsyncOneStepSarsa, HealingVecEnv
from sb3_async1step.a3c.actor_learner import A3CActorLearner
from sb3_async1step.async_n_step_q.actor_learner import NStepQActorLearner
from sb3_async1step.async_one_step_sarsa.actor_learner import SarsaRollout
from sb3_async1step.common import async_algorithm
from sb3_async1step.vec_envs import process_watcher
from sb3_async1step.workers.lanes import Lanes, SharedLanes
from sb3_async1step.workers.rollout import Rollout
from tests.envs import BoxWalkEnv, RandomWalkEnv, make_env
from tests.helpers import (
    DEADLINE,
    FOREVER,
    are_equal,
    has_made_steps,
    learns_identity,
    meanwhile,
    press_ctrl_c,
    wait_until,
    weights_of,
)
from tests.test_vec_env_split import UnknownWrapper

pytestmark = pytest.mark.skipif(os.name != "posix", reason="starts processes by fork, and interrupts by signals")

fork = multiprocessing.get_context("fork") if os.name == "posix" else None


class WaitingEnv(RandomWalkEnv):
    """
    An env that waits in each step until it is released.

    :param release: a multiprocessing Event
    :param patience: seconds after which it goes on nevertheless
    """

    def __init__(self, release, patience=DEADLINE):
        super().__init__()
        self.release, self.patience = release, patience
        self.n_steps_in_all = 0

    def step(self, action):
        self.release.wait(self.patience)
        self.n_steps_in_all += 1
        return super().step(action)


class CountingEnv(RandomWalkEnv):
    """Keeps its last observation, and counts its steps."""

    n_steps_in_all = 0

    def step(self, action):
        self.n_steps_in_all += 1
        self.info = {"lane_steps": self.n_steps_in_all}
        return *super().step(action)[:4], self.info


def make_processes(env_fns):
    return SubprocVecEnv([lambda fn=fn: Monitor(fn()) for fn in env_fns], start_method="fork")


class BeginsWithIntegers(gym.Env):
    """Its space is of floats, and its first observations are integers."""

    observation_space = gym.spaces.Box(-9, 9, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.n_steps = 0
        return np.array([0]), {}

    def step(self, action):
        self.n_steps += 1
        return np.array([self.n_steps + 0.5], np.float32), 1.0, False, self.n_steps == 4, {}


# ---------------------------------------------------------------------- nobody waits for a slow lane


@pytest.mark.parametrize(("algorithm", "n_workers"), [(AsyncOneStepQ, 1), (AsyncOneStepSarsa, 2), (A3C, 1)])
def test_a_lane_that_hangs_delays_nobody(algorithm, n_workers):
    release = fork.Event()
    env = make_processes([lambda: WaitingEnv(release), *[CountingEnv] * 3])
    model = algorithm("MlpPolicy", env, n_workers=n_workers, update_interval=2)
    seen = []

    def look(locals_, globals_):
        seen.extend(info["lane_steps"] for info in locals_["infos"] if "lane_steps" in info)
        if model.num_timesteps >= 200:
            release.set()
        return True

    model.learn(400, callback=look)
    assert model.num_timesteps == 400
    # What the hanging lane missed, the others made
    assert env.get_attr("n_steps_in_all")[0] == 400 - len(seen) < 200
    assert sum(env.get_attr("n_steps_in_all")) == 400
    # No update waited for it, either
    assert model._n_updates >= 30
    env.close()


@pytest.mark.parametrize("n_workers", [1, 2])
def test_ctrl_c_while_a_lane_hangs(n_workers, monkeypatch):
    """The processes are ended, since one of them does not answer."""
    monkeypatch.setattr(async_algorithm, "INTERRUPT_TIMEOUT", process_watcher.INTERRUPT_TIMEOUT)
    env = make_processes([lambda: WaitingEnv(fork.Event(), FOREVER), CountingEnv])
    processes = list(env.processes)
    model = AsyncOneStepQ("MlpPolicy", env, n_workers=n_workers)

    def interrupt():
        wait_until(lambda: has_made_steps(model, 10))
        press_ctrl_c()

    with (
        meanwhile(interrupt),
        pytest.raises(KeyboardInterrupt),
        pytest.warns(UserWarning, match="did not answer within 1 s after the training was interrupted"),
    ):
        model.learn(10**9)
    # The thread that watches the processes may be the one that learns of their ends
    wait_until(lambda: not any(process.is_alive() for process in processes))
    with pytest.raises(RuntimeError, match="make the env anew and give it to the model by set_env"):
        model.learn(10)
    model.set_env(make_env(2))
    assert model.learn(10).num_timesteps == 10


def test_ctrl_c_leaves_envs_that_answer():
    env = make_processes([CountingEnv] * 2)
    model = AsyncOneStepQ("MlpPolicy", env)

    def interrupt():
        wait_until(lambda: has_made_steps(model, 10))
        press_ctrl_c()

    with meanwhile(interrupt), pytest.raises(KeyboardInterrupt):
        model.learn(10**9)
    assert model.learn(10).num_timesteps == 10
    env.close()


def test_a_lane_that_is_replaced_delays_nobody(tmp_path):
    def make_hanging():
        # In the first process only
        marker = tmp_path / "has hung"
        patience = 0.0 if marker.exists() else FOREVER
        marker.touch()
        return WaitingEnv(fork.Event(), patience)

    env = HealingVecEnv([make_hanging, *[CountingEnv] * 3], start_method="fork", step_timeout=FOREVER)
    model = AsyncOneStepQ("MlpPolicy", env)
    steps_before = []

    def look(locals_, globals_):
        if env.n_restarts == 0:
            steps_before.append(model.num_timesteps)
        if model.num_timesteps >= 100:
            # Not before: the first update alone may take as long on a busy machine
            env.settings.step_timeout = 0.5
        return env.n_restarts == 0 or model.num_timesteps < steps_before[-1] + 400

    with pytest.warns(UserWarning, match=r"Env lane 0 was restarted: it did not answer within 0.5 s"):
        model.learn(10**9, callback=look)
    assert len(steps_before) > 1
    env.close()


# ---------------------------------------------------------------------- what callbacks see, and where the envs stop


@pytest.mark.parametrize(("n_workers", "total", "made"), [(1, 100, 100), (2, 101, 104), (4, 101, 104), (1, 3, 4)])
def test_each_transition_is_reported_once(algorithm, n_workers, total, made):
    env = make_processes([CountingEnv] * 4)
    model = algorithm("MlpPolicy", env, n_workers=n_workers, update_interval=3)
    seen, sizes = [], []

    def look(locals_, globals_):
        names = ("actions", "new_obs", "rewards", "dones", "infos")
        sizes.append([len(locals_[name]) for name in names])
        seen.extend(locals_["infos"])
        return True

    assert model.learn(total, callback=look).num_timesteps == made
    assert sizes == [[4] * 5] * (made // 4)
    assert len(seen) == made == sum(env.get_attr("n_steps_in_all"))
    model.learn(total, callback=look, reset_num_timesteps=False)
    assert len(seen) == 2 * made == sum(env.get_attr("n_steps_in_all"))
    env.close()


def test_the_lanes_are_where_the_workers_are(algorithm):
    """Also those that stepped when a callback ended the training."""
    env = VecFrameStack(make_processes([CountingEnv] * 4), 2)
    model = algorithm("MlpPolicy", env, n_workers=1)
    for _ in range(3):
        model.learn(1000, callback=lambda *_: model.num_timesteps < 40, reset_num_timesteps=False)
        states = np.array(env.get_attr("state"), dtype=np.float32)
        np.testing.assert_array_equal(model._last_obs[:, 4:], states)
        np.testing.assert_array_equal(env.stacked_obs.stacked_obs, model._last_obs)
        assert not env.unwrapped.waiting
    env.close()


@pytest.mark.parametrize("n_workers", [1, 2])
def test_callbacks_ask_lanes_that_step(n_workers):
    env = make_processes([CountingEnv] * 4)
    model = AsyncOneStepQ("MlpPolicy", env, n_workers=n_workers)
    asked = []

    def ask(locals_, globals_):
        asked.append(env.get_attr("max_steps"))
        env.set_attr("level", model.num_timesteps)
        return True

    assert model.learn(200, callback=ask).num_timesteps == 200
    assert asked == [[11] * 4] * 50
    assert env.get_attr("level") == [200] * 4
    env.close()


def test_a_forked_process_takes_no_answers_from_lanes_that_step():
    env = make_processes([CountingEnv] * 4)
    model = AsyncOneStepQ("MlpPolicy", env)
    exit_codes = []

    def ask_in_a_child(locals_, globals_):
        if any(worker.env.n_idle < worker.n_lanes for worker in model._pool.workers) and not exit_codes:
            child = os.fork()
            if child == 0:
                try:
                    env.get_attr("max_steps")
                except RuntimeError as error:
                    os._exit(42 if "Ask them before the fork" in str(error) else 1)
                os._exit(0)
            exit_codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return not exit_codes

    model.learn(10**9, callback=ask_in_a_child)
    assert exit_codes == [42]
    assert env.get_attr("max_steps") == [11] * 4
    env.close()


def test_statistics_and_episodes(algorithm):
    env = VecNormalize(VecMonitor(make_processes([CountingEnv] * 4)))
    model = algorithm("MlpPolicy", env)
    episodes = []

    def look(locals_, globals_):
        episodes.extend(info["episode"]["l"] for info in locals_["infos"] if "episode" in info)
        return True

    model.learn(400, callback=look)
    # The observations of the reset, and of each step
    assert env.obs_rms.count == pytest.approx(4 + 400, abs=0.01)
    assert env.venv.episode_count == len(episodes) == model._episode_num
    assert sum(episodes) + env.venv.episode_lengths.sum() == 400
    env.close()


# ---------------------------------------------------------------------- when they step together


def test_serial_mode_is_reproducible(algorithm):
    models = []
    for make in (make_processes, lambda env_fns: DummyVecEnv([lambda fn=fn: Monitor(fn()) for fn in env_fns])):
        env = make([RandomWalkEnv] * 4)
        models.append(algorithm("MlpPolicy", env, n_workers=2, backend="serial", seed=0).learn(200))
        env.close()
    assert are_equal(*map(weights_of, models))


@pytest.mark.parametrize(
    ("make", "in_step", "own_pace"),
    [
        (lambda: make_processes([RandomWalkEnv] * 2), False, True),
        (lambda: make_processes([RandomWalkEnv] * 2), True, False),
        (lambda: VecNormalize(make_processes([RandomWalkEnv] * 2)), False, True),
        (lambda: HealingVecEnv([RandomWalkEnv] * 2, start_method="fork"), False, True),
        (lambda: UnknownWrapper(make_processes([RandomWalkEnv] * 2)), False, False),
        (lambda: make_env(2), False, False),
    ],
)
def test_which_lanes_go_at_their_own_pace(make, in_step, own_pace):
    env = make()
    (lanes,) = SharedLanes(env, 1, in_step).make_lanes()
    assert lanes.is_async == own_pace
    env.close()


def test_a_lane_for_each_worker():
    env = make_processes([RandomWalkEnv] * 2)
    assert [lanes.is_async for lanes in SharedLanes(env, 2, in_step=False).make_lanes()] == [True, True]
    env.close()


# ---------------------------------------------------------------------- learning from uneven rollouts


def make_uneven_steps(action_space, lengths):
    """A rollout's arrays for each lane, the first axis of which is time."""
    rng = np.random.default_rng(0)
    lanes = []
    for i, n_steps in enumerate(lengths):
        ends = np.zeros(n_steps, dtype=bool)
        ends[1:2] = True
        actions = [action_space.sample() for _ in range(n_steps)]
        lanes.append(
            Rollout(
                rng.normal(size=(n_steps, 4)).astype(np.float32),
                np.array(actions),
                rng.normal(size=n_steps).astype(np.float32),
                rng.normal(size=(n_steps, 4)).astype(np.float32),
                ends & (i == 1),
                ends & (i == 2),
            )
        )
    return lanes


def compute_gradient(algorithm, env_class, steps, n_lanes):
    """Of transitions that are given as pairs of lanes and arrays of one time step, in their order."""
    model = algorithm("MlpPolicy", make_env(n_lanes, env_class), n_workers=1, update_interval=5, seed=0)
    (worker,) = model._make_workers([Lanes(model.env)], [range(n_lanes)], model.env.reset())
    for lanes, arrays in steps:
        next_actions = np.zeros(len(arrays["rewards"]), dtype=int)
        is_sarsa = algorithm is AsyncOneStepSarsa
        worker.rollout.add(SarsaRollout(**arrays, next_actions=next_actions) if is_sarsa else Rollout(**arrays), lanes)
    worker.accumulate_gradient()
    return worker.local.get_gradients()


@pytest.mark.parametrize(
    ("algorithm", "env_class"),
    [
        (AsyncOneStepQ, RandomWalkEnv),
        (AsyncOneStepSarsa, RandomWalkEnv),
        (AsyncNStepQ, RandomWalkEnv),
        (A3C, RandomWalkEnv),
        (A3C, BoxWalkEnv),
    ],
)
def test_the_gradient_of_an_uneven_rollout(algorithm, env_class):
    """The sum over the time steps of each lane, and the mean over the lanes, as if each lane had its own rollout."""
    env_class.action_space.seed(0)
    lanes = make_uneven_steps(env_class.action_space, [3, 5, 4, 0, 1])
    uneven = []
    for t in range(5):
        there = np.array([i for i, lane in enumerate(lanes) if len(lane) > t])
        # Not all that are there come at once
        uneven += [(some, take_steps(lanes, some, t)) for some in (there[1:], there[:1]) if len(some) > 0]
    alone = [
        compute_gradient(algorithm, env_class, [(slice(None), take_steps(lanes, [i], t)) for t in range(len(lane))], 1)
        for i, lane in enumerate(lanes)
        if len(lane) > 0
    ]
    computed = compute_gradient(algorithm, env_class, uneven, len(lanes))
    assert any(gradient.abs().max() > 1e-3 for gradient in computed)
    for gradient, *of_lanes in zip(computed, *alone, strict=True):
        th.testing.assert_close(gradient, sum(of_lanes) / len(lanes), rtol=1e-4, atol=1e-6)


def take_steps(lanes, which, t):
    return {name: np.array([vars(lanes[i])[name][t] for i in which]) for name in vars(lanes[0])}


@pytest.mark.parametrize("one_step", [True, False])
def test_when_an_update_is_due(one_step, monkeypatch):
    """After as many transitions as when all lanes step together, or when a lane's segment is full."""
    env = make_processes([RandomWalkEnv] * 6)
    model = (AsyncOneStepQ if one_step else AsyncNStepQ)("MlpPolicy", env, update_interval=3)
    (lanes,) = SharedLanes(model.env, 1, in_step=False).make_lanes()
    (worker,) = model._make_workers([lanes], [range(6)], model.env.reset())

    def step(only):
        """Let only some lanes be ready."""
        if lanes.n_idle:
            worker.begin_step(lanes.n_idle)
        monkeypatch.setattr(lanes, "_list_ready", lambda: only)
        return len(worker.finish_step(lambda n: n).updates)

    if one_step:
        assert [step([0, 1]) for _ in range(9)] == [0] * 8 + [1]
        # A lane gives at most four times its share
        assert [step([0]) for _ in range(12)] == [0] * 11 + [1]
    else:
        assert [step([0, 1]) for _ in range(3)] == [0, 0, 1]
        assert [step([0]) for _ in range(3)] == [0, 0, 1]
        assert [step(ready) for ready in ([0, 1], [2, 3], [1, 2], [3], [0, 1])] == [0, 0, 0, 0, 1]
    model.env.close()


@pytest.mark.parametrize(
    ("algorithm", "n_workers"), [(AsyncOneStepQ, 1), (AsyncOneStepSarsa, 2), (AsyncNStepQ, 1), (A3C, 2)]
)
def test_a_saved_model_goes_on_from_an_uneven_rollout(algorithm, n_workers, tmp_path):
    env = make_processes([CountingEnv] * 4)
    model = algorithm("MlpPolicy", env, n_workers=n_workers, update_interval=7)
    model.learn(10**6, callback=lambda *_: model.num_timesteps < 60)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=env)
    n_before = sum(env.get_attr("n_steps_in_all"))
    loaded.learn(100, reset_num_timesteps=False)
    assert sum(env.get_attr("n_steps_in_all")) == n_before + 100
    # In step from there, too
    loaded.backend = "serial"
    loaded.learn(100, reset_num_timesteps=False)
    assert sum(env.get_attr("n_steps_in_all")) == n_before + 200
    env.close()


@pytest.mark.parametrize("use_sde", [True, False])
def test_continuous_actions(use_sde):
    class Walk(BoxWalkEnv):
        n_steps_in_all = 0

    env = make_processes([Walk] * 4)
    model = A3C("MlpPolicy", env, use_sde=use_sde, sde_sample_freq=2).learn(400)
    assert model.num_timesteps == 400
    env.close()


def test_identity():
    """What is learned."""
    env = make_processes([lambda i=i: seeded(IdentityEnv(dim=4), i) for i in range(4)])
    model = AsyncOneStepQ("MlpPolicy", env, seed=0, learning_rate=0.003, gamma=0.5, update_interval=5)
    assert learns_identity(model)
    env.close()


def seeded(env: gym.Env, seed: int) -> gym.Env:
    env.action_space.seed(seed)
    return env


@pytest.mark.parametrize("make", [DummyVecEnv, lambda env_fns: SubprocVecEnv(env_fns, start_method="fork")])
def test_first_observations_of_integers(make, monkeypatch):
    """What comes later is not rounded to integers, nor is what an episode ends with."""
    env, seen = make([BeginsWithIntegers] * 2), {}

    def look(actor_learner, rollout):
        for name in ("observations", "next_observations"):
            seen.setdefault(name, set()).update(getattr(rollout, name).ravel().tolist())
        return compute_loss(actor_learner, rollout)

    compute_loss = NStepQActorLearner.compute_loss
    monkeypatch.setattr(NStepQActorLearner, "compute_loss", look)
    AsyncNStepQ("MlpPolicy", env, n_workers=1, update_interval=5).learn(40)
    assert seen["observations"] == {0.0, 1.5, 2.5, 3.5}
    # Zeros fill a rollout up whose lanes have unequal numbers of steps
    assert seen["next_observations"] - {0.0} == {1.5, 2.5, 3.5, 4.5}
    env.close()


@pytest.mark.parametrize("total", [1e2, np.float32(99.5)])
def test_a_number_of_steps_that_is_a_float(algorithm, total):
    env = make_processes([CountingEnv] * 4)
    for _ in range(3):
        model = algorithm("MlpPolicy", env, n_workers=1).learn(total)
        assert model.num_timesteps == 100 and type(model.num_timesteps) is int
    assert sum(env.get_attr("n_steps_in_all")) == 300
    env.close()


@pytest.mark.parametrize("freq", [-1, 2, 4])
def test_noise_is_drawn_once_for_all_lanes(freq, monkeypatch):
    """Although some may act before others."""
    draws, draw = [], A3CActorLearner._draw_noise

    def count(actor_learner):
        draws.append(actor_learner._n_since_update)
        draw(actor_learner)

    monkeypatch.setattr(A3CActorLearner, "_draw_noise", count)
    env = make_processes([BoxWalkEnv] * 4)
    model = A3C("MlpPolicy", env, n_workers=1, use_sde=True, sde_sample_freq=freq, update_interval=8).learn(800)
    # At the beginning of each segment, of at most eight steps, and after some of them
    n_draws_in_a_segment = 1 if freq < 0 else 8 // freq
    assert model._n_updates <= len(draws) <= n_draws_in_a_segment * (model._n_updates + 1)
    env.close()
