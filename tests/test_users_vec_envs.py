"""A VecEnv of the user's own: what SB3's DQN converts is converted, and anything else gets an error that says what."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecEnv, VecEnvWrapper

from sb3_async1step import AsyncOneStepQ, BackgroundEvalCallback
from tests.envs import make_env
from tests.helpers import are_equal, weights_of
from tests.test_vec_env_split import DictEnv


class Changed(VecEnvWrapper):
    """
    A VecEnv that returns something else.

    :param venv: the VecEnv
    :param change: takes what ``step_wait()`` returns, and returns the same
    :param change_obs: takes what ``reset()`` returns
    """

    def __init__(self, venv, change, change_obs=lambda obs: obs):
        super().__init__(venv)
        self.change, self.change_obs = change, change_obs

    def reset(self):
        return self.change_obs(self.venv.reset())

    def step_wait(self):
        return self.change(*self.venv.step_wait())


CONVERTED = {
    "lists": (lambda obs, r, d, i: (obs.tolist(), r.tolist(), d.tolist(), tuple(i)), lambda obs: obs.tolist()),
    "tensors": (lambda obs, r, d, i: (*map(th.as_tensor, (obs, r, d)), i), th.as_tensor),
    "numbers": (lambda obs, r, d, i: (obs, r.astype(np.float64), d.astype(float), i), lambda obs: obs),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_what_is_converted(algorithm, kind):
    seen = []

    def look(locals_, globals_):
        seen.append([type(locals_[name]) for name in ("new_obs", "rewards", "dones", "infos")])
        return True

    results = []
    for change in (CONVERTED[kind], CONVERTED["numbers"]):
        env = Changed(make_env(3), *change)
        model = algorithm("MlpPolicy", env, n_workers=1, update_interval=2, seed=0)
        results.append(weights_of(model.learn(120, callback=look)))
    assert are_equal(*results)
    assert seen == [[np.ndarray, np.ndarray, np.ndarray, list]] * 80


def without_key(key):
    def change(obs, rewards, dones, infos):
        return obs, rewards, dones, [{name: value for name, value in info.items() if name != key} for info in infos]

    return change


REFUSED = {
    r'The info of env lane \d says "TimeLimit.truncated", but its "terminal_observation" is missing': without_key(
        "terminal_observation"
    ),
    r"The env returned rewards of shape \(2,\) for 3 lane": lambda obs, r, d, i: (obs, r[:2], d, i),
    r"The env returned dones of shape \(\) for 3 lane": lambda obs, r, d, i: (obs, r, False, i),
    r"observations of env lanes 0 to 2 had the shape \(3, 4\), now \(3, 1\)": lambda obs, *rest: (obs[:, :1], *rest),
    r"The observation of env lanes 0 to 2 is a dict, but the observation space is not": lambda obs, *rest: (
        {"a": obs}, *rest
    ),
    r"infos of env lanes 0 to 2 have to be a dict for each lane, got None": lambda obs, r, d, i: (obs, r, d, None),
    r"infos of env lanes 0 to 2 have to be .* got \[None, None, None\]": lambda obs, r, d, i: (obs, r, d, [None] * 3),
    r"infos of env lanes 0 to 2 have to be .* got \[\{": lambda obs, r, d, i: (obs, r, d, i[:2]),
    r"infos of env lanes 0 to 2 have to be .* got \{": lambda obs, r, d, i: (obs, r, d, dict(enumerate(i))),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_no_one_can_convert(algorithm, message):
    env = Changed(make_env(3), REFUSED[message])
    with pytest.raises(ValueError, match=message) as caught:
        algorithm("MlpPolicy", env, n_workers=1).learn(200)
    assert caught.value.__notes__ == ["Raised in the worker of env lanes 0 to 2."]


def test_no_terminal_observation_is_needed_after_a_termination(algorithm):
    env = Changed(make_env(2, max_steps=10**6, p_terminate=0.2), without_key("terminal_observation"))
    assert algorithm("MlpPolicy", env, n_workers=1).learn(100).num_timesteps == 100


@pytest.mark.parametrize(
    "space",
    [
        spaces.Tuple([spaces.Discrete(3), spaces.Box(-1, 1, (2,))]),
        spaces.Text(5),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Graph(spaces.Box(-1, 1, (2,)), None),
        spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Text(3)}),
    ],
    ids=lambda space: type(space).__name__,
)
def test_observation_spaces_that_are_not_supported(algorithm, space):
    env = make_env(1)
    env.observation_space = space
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    with pytest.raises(AssertionError, match=r"only supports .*MultiBinary.* as observation spaces but .* was"):
        algorithm(policy, env)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda obs: None, r"reset\(\) returned None"),
        (
            lambda obs: obs[:2],
            r"returned observations of the shape \(2, 4\): 3 lane\(s\) of .* need \(3, 4\)",
        ),
        (lambda obs: obs[:, :1], r"reset\(\) returned observations of the shape \(3, 1\)"),
        (lambda obs: {"a": obs}, "The first observation is a dict, but the observation space is not one"),
    ],
)
def test_first_observations_that_no_one_can_convert(algorithm, change, message):
    env = Changed(make_env(3), lambda *result: result, change)
    with pytest.raises(ValueError, match=message):
        algorithm("MlpPolicy", env, n_workers=1).learn(20)


def test_flags_of_truncations_may_be_arrays(algorithm):
    """An array would be broadcast to all lanes."""

    def change(kind):
        def change_flags(obs, rewards, dones, infos):
            flag = "TimeLimit.truncated"
            return obs, rewards, dones, [{**info, flag: kind(info.get(flag, False))} for info in infos]

        return change_flags

    weights = [
        weights_of(algorithm("MlpPolicy", Changed(make_env(3), change(kind)), n_workers=1, seed=0).learn(120))
        for kind in (bool, lambda flag: np.array([flag]), lambda flag: th.tensor(flag))
    ]
    assert are_equal(*weights[:2]) and are_equal(weights[0], weights[2])


# ---------------------------------------------------------------------- dicts


def in_order(observations):
    return observations


def reversed_keys(observations):
    return {key: observations[key] for key in reversed(list(observations))}


def with_another(observations):
    return {"another": np.zeros(1), **observations}


def without_vector(observations):
    return {"image": observations["image"]}


def change_dicts(change):
    def change_step(obs, rewards, dones, infos):
        key = "terminal_observation"
        return change(obs), rewards, dones, [{**i, key: change(i[key])} if key in i else i for i in infos]

    return change_step, change


def test_keys_of_dicts_may_be_in_any_order_and_more(algorithm):
    weights = [
        weights_of(
            algorithm(
                "MultiInputPolicy", Changed(DummyVecEnv([DictEnv] * 3), *change_dicts(change)), n_workers=1, seed=0
            ).learn(120)
        )
        for change in (in_order, reversed_keys, with_another)
    ]
    assert are_equal(*weights[:2]) and are_equal(weights[0], weights[2])


@pytest.mark.parametrize("where", ["step", "reset", "end"])
def test_a_missing_key(algorithm, where):
    key = "terminal_observation"

    def change_end(obs, rewards, dones, infos):
        return obs, rewards, dones, [{**i, key: without_vector(i[key])} if key in i else i for i in infos]

    change = {"step": lambda obs, *rest: (without_vector(obs), *rest), "end": change_end}.get(where, lambda *all_: all_)
    env = Changed(DummyVecEnv([DictEnv] * 3), change, without_vector if where == "reset" else in_order)
    name = {"step": "observation of env lanes 0 to 2", "reset": "first observation"}.get(where, r"terminal .* lane \d")
    with pytest.raises(ValueError, match=f"The {name} lacks vector: it needs the keys of the observation space"):
        algorithm("MultiInputPolicy", env, n_workers=1).learn(200)


# ---------------------------------------------------------------------- adapters of other libraries


class Simulator(gym.Env):
    """
    Many envs in one object that is no VecEnv, as other libraries have them.

    :param venv: runs them
    """

    def __init__(self, venv):
        self.venv, self.num_envs = venv, venv.num_envs
        self.observation_space, self.action_space = venv.observation_space, venv.action_space

    def reset(self):
        return self.venv.reset()

    def step(self, actions):
        return self.venv.step(actions)


class LikeIsaacLab(VecEnv):
    """Innermost is the library's own object, and most requests are refused."""

    def __init__(self, env):
        self.env = env
        super().__init__(env.num_envs, env.observation_space, env.action_space)

    @property
    def unwrapped(self):
        return self.env.unwrapped

    def reset(self):
        return self.env.reset()

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        return self.env.step(self.actions)

    def close(self):
        self.env.close()

    def get_attr(self, attr_name, indices=None):
        return [getattr(self.env, attr_name)] * self.num_envs

    def set_attr(self, attr_name, value, indices=None):
        raise NotImplementedError

    def env_method(self, method_name, *args, indices=None, **kwargs):
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class, indices=None):
        raise NotImplementedError


class LikeGodot(LikeIsaacLab):
    """Neither VecEnv's constructor nor its way to step."""

    def __init__(self, env):
        self.env, self.num_envs = env, env.num_envs
        self.observation_space, self.action_space = env.observation_space, env.action_space

    def step(self, actions):
        return self.env.step(actions)

    def step_async(self, actions):
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class, indices=None):
        return False


class LikeEnvPool(VecEnvWrapper):
    """A wrapper, but not of a VecEnv."""

    def reset(self):
        return self.venv.reset()

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        return self.venv.step(self.actions)


class LikeSuperSuit(LikeEnvPool):
    """It has nothing that the constructors of its parents set, and something else for the infos of resets."""

    def __init__(self, env):
        self.venv, self.num_envs = env, env.num_envs
        self.observation_space, self.action_space = env.observation_space, env.action_space

    def reset(self):
        self.reset_infos = {"agent": {}}
        return super().reset()

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False]

    def getattr_recursive(self, name):
        raise AttributeError(name)

    def getattr_depth_check(self, name, already_found):
        return None


ADAPTERS = (LikeIsaacLab, LikeGodot, LikeEnvPool, LikeSuperSuit)


@pytest.mark.filterwarnings("ignore:The `render_mode` attribute is not defined")
@pytest.mark.parametrize(
    ("adapter", "is_wrapped"),
    # Wrappers step in another way than LikeGodot has it
    [*((adapter, False) for adapter in ADAPTERS), *((adapter, True) for adapter in ADAPTERS if adapter != LikeGodot)],
)
def test_adapters_of_other_libraries(algorithm, adapter, is_wrapped):
    """What SB3's algorithms train on."""
    base = adapter(Simulator(make_env(3)))
    kept = {"agent": {}} if adapter is LikeSuperSuit else getattr(base, "reset_infos", None)
    env = VecCheckNan(base) if is_wrapped else base
    n_episodes = 0

    def step(locals_, globals_):
        nonlocal n_episodes
        n_episodes += locals_["dones"].sum()
        for stepped in (env, base):
            with pytest.raises(RuntimeError, match="nobody else may step or reset it"):
                stepped.step(np.zeros(3, dtype=int))
        return True

    algorithm("MlpPolicy", env, n_workers=1).learn(100, callback=step)
    assert n_episodes >= 3
    assert getattr(base, "reset_infos", None) == kept
    # Nobody guards it any more
    env.step(np.zeros(3, dtype=int))


@pytest.mark.filterwarnings("ignore:The `render_mode` attribute is not defined")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_two_adapters_of_the_same_envs(adapter):
    """An evaluation would step what the training steps."""
    simulator = Simulator(make_env(2))
    model = AsyncOneStepQ("MlpPolicy", adapter(simulator), n_workers=1)
    with pytest.raises(ValueError, match="The evaluation env is the training env"):
        model.learn(20, callback=BackgroundEvalCallback(VecCheckNan(adapter(simulator))))
