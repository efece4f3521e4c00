"""Counting, determinism, and the workers' independence of each other."""

import threading
import time
import warnings
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_async1step import AsyncOneStepQ, AsyncOneStepSarsa, SharedRMSprop
from sb3_async1step.async_one_step_sarsa.actor_learner import SarsaRollout
from sb3_async1step.common.parallelism import count_workers
from sb3_async1step.registry import ALGORITHMS
from sb3_async1step.value_based.target_network import SharedQNetworks
from sb3_async1step.workers.lanes import Lanes
from sb3_async1step.workers.rollout import Rollout
from sb3_async1step.workers.shared_parameters import LocalParameters, SharedParameters
from tests.envs import BlockingEnv, RandomWalkEnv, make_env
from tests.helpers import DEADLINE, are_equal, wait_until, weights_of, with_worker
from tests.test_vec_env_split import DictEnv, ImageEnv, UnknownWrapper

BACKENDS = ["threads", "serial"]
# A small one has a single worker
LARGE_NETWORK = {"net_arch": [1024, 1024]}


class Spy(BaseCallback):
    """Keeps what each call of ``on_step`` saw."""

    def __init__(self):
        super().__init__()
        self.tape = []

    def _on_step(self):
        shapes = [len(self.locals[name]) for name in ("actions", "new_obs", "rewards", "dones", "infos")]
        self.tape.append((self.num_timesteps, shapes, threading.current_thread()))
        return True


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("n_lanes", "n_workers", "total", "made"),
    [(1, 1, 50, 50), (4, 2, 100, 100), (4, 2, 101, 104), (4, 4, 99, 100), (4, 1, 1, 4), (16, 2, 64, 64)],
)
def test_on_step_fires_once_per_num_envs_transitions(backend, n_lanes, n_workers, total, made):
    spy = Spy()
    model = AsyncOneStepQ("MlpPolicy", make_env(n_lanes), n_workers=n_workers, backend=backend)
    model.learn(total, callback=spy)
    assert spy.tape == [(n, [n_lanes] * 5, threading.current_thread()) for n in range(n_lanes, made + 1, n_lanes)]
    assert model.num_timesteps == made
    model.learn(total, callback=spy, reset_num_timesteps=False)
    assert model.num_timesteps == made + -(-total // n_lanes) * n_lanes


@pytest.mark.parametrize("total", [1, 7, 100, 1001])
def test_groups_of_unequal_size_overshoot_by_less_than_a_vector_step(total):
    spy = Spy()
    model = AsyncOneStepQ("MlpPolicy", make_env(5), n_workers=2, seed=0).learn(total, callback=spy)
    assert total <= model.num_timesteps < total + 5
    assert [n for n, *_ in spy.tape] == list(range(5, model.num_timesteps + 1, 5))
    assert sum(len(env.unwrapped.tape) - env.unwrapped.tape.count("reset") for env in model.env.envs) == (
        model.num_timesteps
    )


@pytest.mark.parametrize(("interval", "backend"), [(3, "threads"), (37, "serial"), (150, "threads")])
def test_target_syncs_exactly_once_for_each_multiple(value_based, backend, interval, monkeypatch):
    def sync_target(shared, n_times, tau):
        n_syncs.append(n_times)
        sync_target_of_shared(shared, n_times, tau)

    n_syncs = []
    sync_target_of_shared = SharedQNetworks.sync_target
    monkeypatch.setattr(SharedQNetworks, "sync_target", sync_target)
    model = value_based("MlpPolicy", make_env(4), n_workers=4, target_update_interval=interval, backend=backend)
    model.learn(320)
    assert sum(n_syncs) == 320 // interval
    # The phase goes on
    model.learn(140, reset_num_timesteps=False)
    assert sum(n_syncs) == 460 // interval


@pytest.mark.parametrize("n_workers", [1, 3])
def test_the_seed_decides_all_in_serial_mode(algorithm, n_workers):
    def train(seed):
        env = make_env(3)
        return weights_of(algorithm("MlpPolicy", env, seed=seed, n_workers=n_workers, backend="serial").learn(150))

    one, same, other = train(1), train(1), train(2)
    assert are_equal(one, same)
    assert not are_equal(one, other)


def test_without_a_seed_numpys_global_generator_decides(algorithm):
    def train():
        np.random.seed(3)
        th.manual_seed(3)
        env = make_env(2)
        env.seed(0)
        return weights_of(algorithm("MlpPolicy", env, backend="serial").learn(300))

    assert are_equal(train(), train())


@pytest.mark.parametrize("where", ["step", "reset"])
def test_a_lane_that_hangs_does_not_hold_up_the_others(algorithm, where):
    release = threading.Event()
    env = DummyVecEnv([lambda: BlockingEnv(release, where), RandomWalkEnv, RandomWalkEnv])

    class ReleaseLate(BaseCallback):
        """Lets the lane go on as soon as each of the others has made 100 steps beside it."""

        steps_at_first = None

        def _on_step(self):
            if not env.envs[0].hangs.is_set():
                return True
            steps = [len(e.unwrapped.tape) for e in env.envs]
            self.steps_at_first = self.steps_at_first or steps
            made = [n - before for n, before in zip(steps, self.steps_at_first, strict=True)]
            if min(made[1:]) < 100:
                return True
            assert made[0] == 0
            release.set()
            return False

    # Unless they do, the lane's patience ends
    algorithm("MlpPolicy", env, n_workers=3).learn(10**9, callback=ReleaseLate())
    assert release.is_set()


def test_sarsa_executes_the_action_it_bootstrapped_on():
    """The tape of what was bootstrapped on and what the env executed, across updates and ends of episodes."""
    bootstrapped = []

    def compute_loss(parents, worker, rollout):
        bootstrapped.extend(zip(rollout.next_actions[:, 0].tolist(), rollout.terminated[:, 0].tolist(), strict=True))
        return parents(rollout)

    env = make_env(1, max_steps=10**9, p_terminate=0.1)
    recording = with_worker(AsyncOneStepSarsa, compute_loss=compute_loss)
    recording("MlpPolicy", env, update_interval=3, target_update_interval=7, seed=0).learn(500)
    tape = env.envs[0].unwrapped.tape
    expected = []
    for entry, following in pairwise(tape[1:]):
        if entry != "reset":
            expected.append(None if following == "reset" else following)
    seen = [None if terminated else action for action, terminated in bootstrapped]
    assert len(seen) >= 490
    assert seen == expected[: len(seen)]
    assert None in seen


def test_truncation_bootstraps_from_the_terminal_observation_and_termination_does_not(algorithm):
    """An env whose observations are its step numbers: s' of the last step is no first observation."""

    class CountingEnv(gym.Env):
        observation_space = gym.spaces.Box(-1, 100, (1,), dtype=np.float32)
        action_space = gym.spaces.Discrete(2)

        def __init__(self, truncates):
            self.truncates = truncates

        def reset(self, *, seed=None, options=None):
            self.n = 0
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.n += 1
            over = self.n == 3
            return np.full(1, self.n, np.float32), 1.0, over and not self.truncates, over and self.truncates, {}

    seen = []

    def compute_loss(parents, worker, rollout):
        seen.append(rollout)
        return parents(rollout)

    env = DummyVecEnv([lambda: CountingEnv(True), lambda: CountingEnv(False)])
    with_worker(algorithm, compute_loss=compute_loss)("MlpPolicy", env, n_workers=1, update_interval=6).learn(12)
    (rollout,) = seen
    assert rollout.observations[:, 0].flatten().tolist() == [0, 1, 2, 0, 1, 2]
    assert rollout.next_observations[:, 0].flatten().tolist() == [1, 2, 3, 1, 2, 3]
    assert rollout.terminated.tolist() == [[False, False], [False, False], [False, True]] * 2
    assert rollout.truncated.tolist() == [[False, False], [False, False], [True, False]] * 2


@pytest.mark.parametrize("sarsa", [False, True])
@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_td_targets(sarsa, loss):
    model = (AsyncOneStepSarsa if sarsa else AsyncOneStepQ)("MlpPolicy", make_env(2), gamma=0.5, loss=loss, seed=0)
    with th.no_grad():
        for parameter in model.q_net_target.parameters():
            parameter.mul_(2.0)
    rng = np.random.default_rng(0)
    observations, next_observations = rng.standard_normal((2, 3, 2, 4), dtype=np.float32)
    actions, next_actions = rng.integers(3, size=(2, 3, 2))
    rewards = rng.standard_normal((3, 2), dtype=np.float32)
    terminated = np.array([[False, True], [False, False], [True, False]])
    fields = (observations, actions, rewards, next_observations, terminated, np.zeros((3, 2), bool))
    rollout = SarsaRollout(*fields, next_actions) if sarsa else Rollout(*fields)

    errors, q_values = [], []
    for i in np.ndindex(3, 2):
        q_next = model.q_net_target(th.as_tensor(next_observations[i])[None])[0]
        value = q_next[next_actions[i]] if sarsa else q_next.max()
        y = rewards[i] if terminated[i] else rewards[i] + 0.5 * value
        q_values.append(model.q_net(th.as_tensor(observations[i])[None])[0, actions[i]].detach())
        errors.append(y - q_values[-1])
    errors = th.stack(errors).detach()
    expected = (
        errors.square() if loss == "mse" else th.where(errors.abs() < 1, 0.5 * errors.square(), errors.abs() - 0.5)
    )

    (worker,) = model._make_workers([Lanes(model.env)], [range(2)], model.env.reset())
    computed, metrics = worker.compute_loss(rollout)
    th.testing.assert_close(computed, expected.mean())
    assert metrics == pytest.approx({"train/loss": float(expected.mean()), "train/q_mean": float(np.mean(q_values))})
    computed.backward()
    assert all(p.grad is None for p in model.q_net_target.parameters())
    assert all(p.grad is not None for p in worker.local.learning_network.parameters())


@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.5])
def test_the_gradient_is_clipped(max_grad_norm):
    norms = []

    class Recording(th.optim.SGD):
        def step(self, closure=None):
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(float(th.nn.utils.get_total_norm(gradients)))
            return super().step(closure)

    model = AsyncOneStepQ(
        "MlpPolicy", make_env(1), max_grad_norm=max_grad_norm, update_interval=5, loss="mse",
        policy_kwargs={"optimizer_class": Recording},
    )  # fmt: skip
    model.learn(200)
    assert len(norms) >= 40
    assert max(norms) == pytest.approx(max_grad_norm, rel=1e-2)


def test_lanes_of_a_worker_do_not_change_the_size_of_the_gradient():
    """Eight identical lanes make the same update as one."""

    policy_kwargs = {"optimizer_class": SharedRMSprop}

    def train(n_lanes):
        env = DummyVecEnv([lambda: RandomWalkEnv(max_steps=1000, p_terminate=0.0) for _ in range(n_lanes)])
        model = AsyncOneStepQ(
            "MlpPolicy", env, n_workers=1, update_interval=5, exploration_initial_eps=0.0, exploration_final_eps=0.0,
            policy_kwargs=policy_kwargs,
        )  # fmt: skip
        start = AsyncOneStepQ("MlpPolicy", make_env(1), seed=0, policy_kwargs=policy_kwargs)
        model.policy.load_state_dict(start.policy.state_dict())
        env._seeds = [3] * n_lanes
        model.learning_rate = 0.01
        return weights_of(model.learn(5 * n_lanes))

    one, eight = train(1), train(8)
    for name in one:
        th.testing.assert_close(one[name], eight[name], rtol=1e-4, atol=1e-6)


def test_paper_layout_updates_at_the_end_of_an_episode():
    env = make_env(1, max_steps=3, p_terminate=0.0)
    model = AsyncOneStepQ("MlpPolicy", env, update_interval=5).learn(30)
    assert model._n_updates == 10
    grouped = AsyncOneStepQ("MlpPolicy", make_env(2, max_steps=3), n_workers=1, update_interval=5).learn(60)
    assert grouped._n_updates == 6


def test_staleness_is_measured(algorithm):
    """All workers read the weights before any of them applies its gradient: each update finds one more before it."""
    all_have_read = threading.Barrier(8)

    def compute_loss(parents, worker, rollout):
        all_have_read.wait(DEADLINE)
        return parents(rollout)

    parameters = {"n_workers": 8, "update_interval": 1, "policy_kwargs": {"net_arch": []}}
    model = with_worker(algorithm, compute_loss=compute_loss)(
        "MlpPolicy", make_env(8), lock_updates=False, **parameters
    )
    seen = []

    class Collect(BaseCallback):
        def _on_step(self):
            seen.extend(update.gradient_staleness for update in self.locals["transitions"].updates)
            return True

    model.learn(8, callback=Collect(), log_interval=None)
    assert sorted(seen) == list(range(8))
    serial = AsyncOneStepQ("MlpPolicy", make_env(8), backend="serial", **parameters)
    seen.clear()
    serial.learn(80, callback=Collect(), log_interval=None)
    assert seen == [0] * 80


@pytest.mark.parametrize("update_interval", [1, 3])
def test_workers_learn_in_turns(algorithm, update_interval, monkeypatch):
    """A gradient is of the newest parameters, and nobody changes them before it is applied."""
    before, staleness = [], []

    def compute_loss(parents, worker, rollout):
        before.append(read(worker.shared.parameters))
        assert len(before) == 1 and th.equal(read(worker.local.parameters), before[0])
        # Others would change them now, were they not made to wait
        time.sleep(0.002)
        return parents(rollout)

    def push(local):
        assert th.equal(read(local._shared.parameters), before.pop())
        staleness.append(push_of_worker(local))
        return staleness[-1]

    def read(parameters):
        return th.cat([parameter.detach().flatten() for parameter in parameters])

    push_of_worker = LocalParameters.push
    monkeypatch.setattr(LocalParameters, "push", push)
    parameters = {"n_workers": 4, "policy_kwargs": {"net_arch": [8], "optimizer_class": SharedRMSprop}}
    model = with_worker(algorithm, compute_loss=compute_loss)(
        "MlpPolicy", make_env(8), lock_updates=True, update_interval=update_interval, **parameters
    )
    model.learn(8 * 60)
    assert staleness == [0] * model._n_updates
    # Each worker may have steps left that were not enough for an update
    assert 4 * 60 / update_interval - 4 < model._n_updates <= 4 * 60 / update_interval


@pytest.mark.parametrize(
    ("optimizer_class", "may_overlap"),
    [(SharedRMSprop, True), (th.optim.Adam, False), (th.optim.RMSprop, False)],
)
def test_updates_overlap_only_if_they_may(optimizer_class, may_overlap, monkeypatch):
    """An update lasts until another one has begun; if none may, until another worker has come to its own."""
    coming, running, n_together, creating, have_met = [], [], [], [], threading.Event()

    class Probe(optimizer_class):
        def step(self, closure=None):
            # The first one creates the statistics, and is always alone
            creating.append(len(running) if not any(self.state.values()) else 0)
            running.append(self)
            n_together.append(len(running))
            if len(running) > 1:
                have_met.set()
            elif may_overlap and len(n_together) > 1:
                assert have_met.wait(DEADLINE)
            elif len(n_together) <= 5:
                wait_until(lambda: len(coming) > 1)
                # It would begin now, were it not made to wait
                time.sleep(0.05)
            super().step(closure)
            running.remove(self)

    def push(shared, optimizer, view, gradients):
        coming.append(view)
        n_updates = push_of_shared(shared, optimizer, view, gradients)
        coming.remove(view)
        return n_updates

    push_of_shared = SharedParameters.push
    monkeypatch.setattr(SharedParameters, "push", push)

    model = AsyncOneStepQ(
        "MlpPolicy", make_env(4), n_workers=4, update_interval=1,
        policy_kwargs={"net_arch": [4], "optimizer_class": Probe},
    )  # fmt: skip
    model.learn(200)
    assert len(n_together) == 200
    assert (max(n_together) > 1) == may_overlap
    assert creating == [0] * 200


@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize(
    ("policy", "env_class", "wrapper"),
    [
        ("MlpPolicy", RandomWalkEnv, None),
        ("MlpPolicy", RandomWalkEnv, VecNormalize),
        ("CnnPolicy", ImageEnv, lambda env: VecFrameStack(env, 4)),
        ("MultiInputPolicy", DictEnv, lambda env: VecFrameStack(env, 2)),
    ],
)
def test_policies_and_wrappers_train(algorithm, policy, env_class, wrapper, n_workers):
    env = DummyVecEnv([env_class for _ in range(4)])
    env = wrapper(env) if wrapper else env
    model = algorithm(policy, env, n_workers=n_workers, seed=0)
    before = weights_of(model)
    model.learn(160)
    after = weights_of(model)
    assert model.get_env() is env or model.get_env().venv is env
    assert not are_equal(before, after)
    obs = model.get_env().reset()
    assert model.predict(obs, deterministic=True)[0].shape == (4,)


# A new Python process takes seconds to start
SLOW_STARTS = [(AsyncOneStepQ, "forkserver"), (AsyncOneStepQ, "spawn")]


@pytest.mark.parametrize(
    ("model_class", "start_method"), [*((entry.model_class, "fork") for entry in ALGORITHMS.values()), *SLOW_STARTS]
)
def test_subprocesses(model_class, start_method):
    env = make_vec_env(RandomWalkEnv, 2, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": start_method})
    model = model_class("MlpPolicy", env, n_workers=2).learn(400)
    assert model.num_timesteps == 400
    model.learn(100, reset_num_timesteps=False)
    assert env.get_attr("max_steps") == [11] * 2
    env.close()


def test_an_unknown_wrapper_gets_one_worker_and_a_warning(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    model = AsyncOneStepQ("MlpPolicy", UnknownWrapper(make_env(4)), policy_kwargs=LARGE_NETWORK)
    with pytest.warns(UserWarning, match="UnknownWrapper can't be split") as record:
        assert model.learn(40).num_timesteps == 40
    # Where the user called learn()
    assert [warning.filename for warning in record] == [__file__]


def test_auto_takes_no_more_workers_than_cores_or_lanes(monkeypatch):
    for cores, n_lanes, n_workers in [(2, 16, 2), (8, 4, 4), (1, 4, 1)]:
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        env = make_env(n_lanes)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = AsyncOneStepQ("MlpPolicy", env, policy_kwargs=LARGE_NETWORK)
            model._last_obs = env.reset()
            assert count_workers("auto", env, model._count_multiplications()) == n_workers


def test_actions_of_a_space_that_does_not_start_at_zero(algorithm):
    class ShiftedEnv(RandomWalkEnv):
        action_space = gym.spaces.Discrete(3, start=5)

        def step(self, action):
            assert self.action_space.contains(int(action))
            return super().step(int(action) - 5)

    env = make_env(2, ShiftedEnv)
    model = algorithm("MlpPolicy", env, n_workers=2).learn(300)
    for deterministic in (True, False):
        actions = {int(model.predict(env.reset(), deterministic=deterministic)[0][0]) for _ in range(20)}
        assert actions <= {5, 6, 7}


def test_predict_is_epsilon_greedy_at_eval_eps():
    model = AsyncOneStepQ("MlpPolicy", make_env(1), eval_eps=0.3, seed=0)
    observations = np.zeros((6000, 4), np.float32)
    greedy = model.predict(observations, deterministic=True)[0]
    assert len(set(greedy)) == 1
    mixed = model.predict(observations)[0]
    assert (mixed != greedy).mean() == pytest.approx(0.3 * 2 / 3, abs=0.03)
    single, _ = model.predict(observations[0])
    assert single.shape == ()


def test_save_and_load(algorithm, tmp_path):
    env = make_env(4)
    model = algorithm("MlpPolicy", env, n_workers=2, seed=0, gamma=0.9).learn(400)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=make_env(2), n_workers=1)
    assert are_equal(weights_of(model), weights_of(loaded))
    assert loaded.gamma == 0.9
    assert loaded.num_timesteps == 400
    state, loaded_state = (m.policy.optimizer.state_dict()["state"] for m in (model, loaded))
    assert all(th.equal(loaded_state[i][name], value) for i in state for name, value in state[i].items())
    assert state
    loaded.learn(100, reset_num_timesteps=False)
    assert loaded.num_timesteps == 500
    observations = env.reset()
    without_env = algorithm.load(tmp_path / "model")
    np.testing.assert_array_equal(
        without_env.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0]
    )


@pytest.mark.parametrize(("total", "learns"), [(1, False), (36, False), (37, True)])
def test_too_few_steps_for_an_update(algorithm, total, learns):
    model = algorithm("MlpPolicy", make_env(4), n_workers=1, update_interval=10)
    before = weights_of(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(total)
    messages = [str(warning.message) for warning in caught if "learns nothing" in str(warning.message)]
    assert len(messages) == (not learns)
    assert learns or "update_interval * n_envs = 10 * 4 = 40 steps" in messages[0]
    assert are_equal(weights_of(model), before) != learns
    # With several workers, one may take most of the steps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        algorithm("MlpPolicy", make_env(4), n_workers=2, update_interval=10).learn(total)
    # The next training goes on with the segment
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(40, reset_num_timesteps=False)
    assert not are_equal(weights_of(model), before)
