"""A split VecEnv makes the transitions of the whole, and gives it back the state of its lanes."""

import threading
import time

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_async1step.vec_envs.split import find_unsplittable, group_lanes, rejoin_vec_env, split_vec_env
from tests.envs import RandomWalkEnv


class ImageEnv(RandomWalkEnv):
    observation_space = spaces.Box(0, 255, (36, 40, 1), dtype=np.uint8)

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return self.draw(obs), info

    def step(self, action):
        obs, *rest = super().step(action)
        return self.draw(obs), *rest

    def draw(self, obs):
        return np.resize(np.abs(obs * 255).astype(np.uint8), self.observation_space.shape)


class DictEnv(RandomWalkEnv):
    observation_space = spaces.Dict({"vector": RandomWalkEnv.observation_space, "image": ImageEnv.observation_space})

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return {"vector": obs, "image": ImageEnv.draw(ImageEnv, obs)}, info

    def step(self, action):
        obs, *rest = super().step(action)
        return {"vector": obs, "image": ImageEnv.draw(ImageEnv, obs)}, *rest


def frames(env):
    return VecFrameStack(env, 3)


def normalize_frozen(env):
    env = VecNormalize(env)
    env.seed(3)
    env.reset()
    env.training = False
    return env


WRAPPERS = {
    "plain": (RandomWalkEnv, []),
    "frames": (RandomWalkEnv, [frames]),
    "images": (ImageEnv, [frames, VecTransposeImage]),
    "dict": (DictEnv, [frames, VecTransposeImage]),
    "two images": (ImageEnv, [lambda env: VecFrameStack(env, 2), VecTransposeImage]),
    "four images": (ImageEnv, [lambda env: VecFrameStack(env, 4), VecTransposeImage]),
    "dict of four": (DictEnv, [lambda env: VecFrameStack(env, 4), VecTransposeImage]),
    "extract": (DictEnv, [lambda env: VecExtractDictObs(env, "vector")]),
    "monitor": (RandomWalkEnv, [VecMonitor, VecCheckNan]),
    "normalize": (RandomWalkEnv, [normalize_frozen]),
    "deep": (RandomWalkEnv, [VecMonitor, normalize_frozen, frames, VecCheckNan]),
}


def forked(env_fns):
    """Processes that start at once: what a start method imports is nothing that a split depends on."""
    return SubprocVecEnv(env_fns, start_method="fork")


def make(env_class, wrappers, base, n_envs):
    env = base([env_class for _ in range(n_envs)])
    for wrapper in wrappers:
        env = wrapper(env)
    env.seed(5)
    return env


def assert_same(one, two):
    """Equal, whatever is nested in it, but for times."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one.keys() - {"t"}:
            assert_same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        np.testing.assert_array_equal(one, two)


def join(parts):
    if isinstance(parts[0], dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)


@pytest.mark.parametrize(
    ("name", "base"), [*((name, DummyVecEnv) for name in WRAPPERS), ("plain", forked), ("deep", forked)]
)
@pytest.mark.parametrize("n_groups", [2, 5])
def test_parts_behave_as_the_whole(name, base, n_groups):
    n_envs = 5
    env_class, wrappers = WRAPPERS[name]
    whole, twin = make(env_class, wrappers, base, n_envs), make(env_class, wrappers, base, n_envs)
    try:
        assert_same(whole.reset(), twin.reset())
        groups = group_lanes(n_envs, n_groups)
        rng = np.random.default_rng(0)
        # Split, rejoin, go on with the whole, and split again
        for _ in range(2):
            parts = split_vec_env(whole, groups)
            assert [part.num_envs for part in parts] == [len(lanes) for lanes in groups]
            for _ in range(30):
                actions = rng.integers(3, size=n_envs)
                results = [part.step(actions[g.start : g.stop]) for part, g in zip(parts, groups, strict=True)]
                obs, rewards, dones, infos = twin.step(actions)
                assert_same(join([result[0] for result in results]), obs)
                assert_same(join([result[1] for result in results]), rewards)
                assert_same(join([result[2] for result in results]), dones)
                assert_same([info for result in results for info in result[3]], list(infos))
            rejoin_vec_env(whole, parts, groups)
            assert_same(list(whole.reset_infos), list(twin.reset_infos))
            for _ in range(5):
                actions = rng.integers(3, size=n_envs)
                assert_same(whole.step(actions), twin.step(actions))
    finally:
        whole.close()
        twin.close()


def test_parts_share_the_running_statistics():
    env = make(RandomWalkEnv, [VecNormalize], DummyVecEnv, 4)
    env.reset()
    parts = split_vec_env(env, group_lanes(4, 2))
    for part in parts:
        for _ in range(10):
            part.step(np.zeros(2, dtype=int))
    # 4 from the reset, 2 parts with 10 steps of 2 lanes
    assert env.obs_rms.count == pytest.approx(4 + 40, abs=0.01)
    assert env.ret_rms.count == pytest.approx(40, abs=0.01)
    twin = make(RandomWalkEnv, [], DummyVecEnv, 4)
    seen = [twin.reset(), *(twin.step(np.zeros(4, dtype=int))[0] for _ in range(10))]
    np.testing.assert_allclose(env.obs_rms.mean, np.concatenate(seen).mean(axis=0), atol=1e-3)
    assert all(part.returns.shape == (2,) for part in parts)
    rejoin_vec_env(env, parts, group_lanes(4, 2))
    np.testing.assert_array_equal(env.returns, np.concatenate([part.returns for part in parts]))
    assert env.get_original_obs().shape == (4, 4)
    np.testing.assert_array_equal(env.get_original_reward(), np.concatenate([part.old_reward for part in parts]))


@pytest.mark.parametrize(("name", "value"), [("gamma", 0.0), ("epsilon", 100.0), ("clip_reward", 0.01)])
def test_parts_follow_all_numbers_of_the_whole(name, value):
    rewards = []
    for in_parts in (False, True):
        env = make(RandomWalkEnv, [VecNormalize], DummyVecEnv, 4)
        env.seed(0)
        env.reset()
        steppers = split_vec_env(env, [range(4)]) if in_parts else [env]
        setattr(env, name, value)
        rewards.append([steppers[0].step(np.zeros(4, dtype=int))[1] for _ in range(8)])
    np.testing.assert_array_equal(*rewards)


def test_parts_follow_the_settings_of_the_whole():
    env = make(RandomWalkEnv, [VecNormalize], DummyVecEnv, 4)
    env.reset()
    parts = split_vec_env(env, group_lanes(4, 2))
    count = env.obs_rms.count
    env.training = env.norm_obs = env.norm_reward = False
    obs, rewards, *_ = parts[1].step(np.zeros(2, dtype=int))
    assert env.obs_rms.count == count
    np.testing.assert_array_equal(obs, parts[1].get_original_obs())
    np.testing.assert_array_equal(rewards, parts[1].get_original_reward())
    env.training = env.norm_obs = True
    parts[0].step(np.zeros(2, dtype=int))
    assert env.obs_rms.count == count + 2


def test_vec_monitor_file_and_counts(tmp_path):
    env = VecMonitor(DummyVecEnv([RandomWalkEnv] * 4), str(tmp_path / "log"))
    env.reset()
    groups = group_lanes(4, 2)
    parts = split_vec_env(env, groups)
    n_episodes = sum(int(part.step(np.zeros(2, dtype=int))[2].sum()) for _ in range(50) for part in parts)
    rejoin_vec_env(env, parts, groups)
    env.close()
    assert n_episodes > 10
    assert env.episode_count == n_episodes
    assert len((tmp_path / "log.monitor.csv").read_text().splitlines()) == 2 + n_episodes


@pytest.mark.parametrize(("num_envs", "n_groups"), [(16, 2), (5, 2), (5, 5), (7, 3), (1, 1)])
def test_groups_are_even(num_envs, n_groups):
    groups = group_lanes(num_envs, n_groups)
    assert [lane for group in groups for lane in group] == list(range(num_envs))
    assert len(groups) == n_groups
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


class UnknownWrapper(VecEnvWrapper):
    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.venv.step_wait()


class SubclassedFrameStack(VecFrameStack):
    pass


def test_unknown_classes_are_found_wherever_they_are():
    env = DummyVecEnv([RandomWalkEnv] * 2)
    assert find_unsplittable(VecMonitor(VecCheckNan(env))) is None
    assert find_unsplittable(VecMonitor(UnknownWrapper(env))) is UnknownWrapper
    # A subclass may keep more for each lane than its parent does
    assert find_unsplittable(VecCheckNan(SubclassedFrameStack(env, 2))) is SubclassedFrameStack


def test_the_error_of_an_unknown_class_says_what_to_do():
    with pytest.raises(TypeError, match=r"UnknownWrapper can't be split, see sb3_async1step.split_vec_env"):
        split_vec_env(UnknownWrapper(DummyVecEnv([RandomWalkEnv])), [range(1)])


def test_users_can_register_their_own():
    class MyWrapper(UnknownWrapper):
        pass

    @split_vec_env.register
    def _(env: MyWrapper, groups):
        return [MyWrapper(part) for part in split_vec_env(env.venv, groups)]

    env = MyWrapper(DummyVecEnv([RandomWalkEnv] * 2))
    assert find_unsplittable(env) is None
    env.reset()
    assert [type(part) for part in split_vec_env(env, group_lanes(2, 2))] == [MyWrapper, MyWrapper]


def test_the_envs_are_the_very_same():
    env = DummyVecEnv([lambda: gym.make("CartPole-v1") for _ in range(3)])
    env.reset()
    parts = split_vec_env(env, group_lanes(3, 2))
    assert [e for part in parts for e in part.envs] == env.envs


def test_original_observations_of_an_env_that_begins_with_integers():
    """Parts store theirs in the whole's, whose first ones may be integers."""
    env = VecNormalize(DummyVecEnv([RandomWalkEnv] * 4))
    env.reset()
    env.old_obs, env.old_reward = env.old_obs.astype(int), np.zeros(4, dtype=int)
    parts = split_vec_env(env, group_lanes(4, 2))
    for part in parts:
        part.step(np.zeros(2, dtype=int))
    for name in ("old_obs", "old_reward"):
        np.testing.assert_array_equal(getattr(env, name), np.concatenate([getattr(part, name) for part in parts]))


def test_parts_update_the_statistics_one_at_a_time(monkeypatch):
    env = make(RandomWalkEnv, [VecNormalize], DummyVecEnv, 4)
    env.reset()
    parts = split_vec_env(env, group_lanes(4, 2))
    inside, n_inside = [], []

    def update_slowly(self, values):
        inside.append(self)
        # Another part would come now, were it not made to wait
        time.sleep(0.02)
        n_inside.append(len(inside))
        update(self, values)
        inside.remove(self)

    update = RunningMeanStd.update
    monkeypatch.setattr(RunningMeanStd, "update", update_slowly)
    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=lambda part=part: (barrier.wait(), part.step([0, 0]))) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert n_inside == [1] * 4
