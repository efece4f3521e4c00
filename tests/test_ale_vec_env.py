"""Atari games in ale_py's engine: the same as Monitor and AtariWrapper, but for the grey of the frames."""

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import psutil
import pytest
from ale_py.env import AtariEnv
from stable_baselines3.common.atari_wrappers import (
    AtariWrapper,
    EpisodicLifeEnv,
    FireResetEnv,
    MaxAndSkipEnv,
    NoopResetEnv,
    StickyActionEnv,
)
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecTransposeImage

from sb3_async1step import AsyncOneStepQ, NipsCNN
from sb3_async1step.vec_envs.ale_vec_env import AleVecEnv
from tests.helpers import wait_until

gym.register_envs(ale_py)


class ShapedPong(AtariEnv):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward + 1, *rest


def make_both(game, n_envs=2, **wrapper_kwargs):
    """The wrapped env and its replacement."""
    make = {"env_id": f"{game}NoFrameskip-v4", "n_envs": n_envs, "seed": 3, "wrapper_kwargs": wrapper_kwargs}
    return make_atari_env(**make), make_atari_env(**make, vec_env_cls=AleVecEnv)


def describe(info):
    """What a step's info says of lives, frames and the end of the game."""
    episode = {name: value for name, value in info.get("episode", {}).items() if name != "t"}
    return info["lives"], info["episode_frame_number"], info["TimeLimit.truncated"], episode


@pytest.mark.parametrize(
    ("game", "wrapper_kwargs", "n_steps"),
    [
        # Lives are lost sooner than games
        *[(game, {}, 300) for game in ("Pong", "Breakout", "SpaceInvaders", "Seaquest", "BeamRider", "Qbert")],
        *[(game, {"terminal_on_life_loss": False, "clip_reward": False}, 600) for game in ("Breakout", "MsPacman")],
    ],
    ids=str,
)
def test_parity(game, wrapper_kwargs, n_steps):
    """Without no-ops (whose number is random), the same actions lead to the same games."""
    original, replacement = make_both(game, noop_max=0, **wrapper_kwargs)
    differences = [np.abs(original.reset().astype(int) - replacement.reset())]
    rng = np.random.default_rng(0)
    n_dones = 0
    for _ in range(n_steps):
        actions = rng.integers(original.action_space.n, size=2)
        obs, rewards, dones, infos = original.step(actions)
        other_obs, other_rewards, other_dones, other_infos = replacement.step(actions)
        assert rewards.tolist() == other_rewards.tolist()
        assert dones.tolist() == other_dones.tolist()
        assert list(map(describe, infos)) == list(map(describe, other_infos))
        assert [info["lives"] for info in original.reset_infos if info] == [
            info["lives"] for first, info in zip(original.reset_infos, replacement.reset_infos, strict=True) if first
        ]
        differences.append(np.abs(obs.astype(int) - other_obs))
        n_dones += dones.sum()
    assert n_dones > 0 or game in ("Pong", "BeamRider")
    assert np.mean(differences) < 0.1
    assert np.max(differences) <= 46
    original.close()
    replacement.close()


def list_colours(game, n_frames):
    """Red, green, blue and ALE's grey of the colours on the screen."""
    env = gym.make(f"{game}NoFrameskip-v4")
    env.reset(seed=0)
    env.action_space.seed(0)
    ale = env.unwrapped.ale
    colours = {}
    for frame in range(n_frames):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
        if frame % 10 > 0:
            continue
        indices, places = np.unique(ale.getScreen(), return_index=True)
        pixels = np.dstack([ale.getScreenRGB(), ale.getScreenGrayscale()]).reshape(-1, 4)
        colours.update(zip(indices.tolist(), pixels[places].tolist(), strict=True))
    env.close()
    return colours


def test_grey_of_colours():
    """
    A colour has the same grey in both. Two frames that differ are pooled by the wrappers' maximum of each of red, green
    and blue, and by the engine's maximum of the greys, which is less. Images are resized after that, which can only
    reduce the difference.
    """
    colours = {}
    for game in ("Zaxxon", "Assault", "Robotank", "VideoPinball", "Amidar", "Solaris", "YarsRevenge", "BattleZone"):
        colours.update(list_colours(game, 100))
    # Of 128, over which the greatest difference is 46 as well
    assert len(colours) > 60
    rgb, grey = np.split(np.array(list(colours.values()), np.uint8), [3], axis=1)
    grey = grey[:, 0].astype(int)
    np.testing.assert_array_equal(cv2.cvtColor(rgb[None], cv2.COLOR_RGB2GRAY)[0], grey)
    pooled = np.maximum(rgb[:, None], rgb[None])
    differences = cv2.cvtColor(pooled, cv2.COLOR_RGB2GRAY) - np.maximum(grey[:, None], grey[None])
    assert differences.min() == 0
    assert 30 < differences.max() <= 46


def measure_grey_difference(game, n_steps):
    """Mean and extremes of the wrappers' observations minus the engine's."""
    original, replacement = make_both(game, n_envs=1, noop_max=0)
    differences = [original.reset().astype(int) - replacement.reset()]
    rng = np.random.default_rng(0)
    for _ in range(n_steps):
        actions = rng.integers(original.action_space.n, size=1)
        differences.append(original.step(actions)[0].astype(int) - replacement.step(actions)[0])
    original.close()
    replacement.close()
    return np.mean(differences), np.min(differences), np.max(differences)


@pytest.mark.parametrize("game", ["Zaxxon", "Assault", "Robotank"])
def test_grey_of_observations(game):
    mean, least, greatest = measure_grey_difference(game, 60)
    assert 0 <= mean < 1 and least >= 0 and greatest <= 46


@pytest.mark.slow
def test_grey_of_all_games():
    games = sorted(name.removesuffix("NoFrameskip-v4") for name in gym.registry if name.endswith("NoFrameskip-v4"))
    games = [game for game in games if not game.endswith("-ram")]
    assert len(games) == 62
    for game in games:
        mean, least, greatest = measure_grey_difference(game, 250)
        # Its colours are those of another television standard, which ALE's grey does not know
        if game == "AirRaid":
            assert least < -46
        else:
            assert mean < 1 and least >= 0 and greatest <= 46, game


def test_truncation():
    def make_env():
        return AtariWrapper(Monitor(gym.make("PongNoFrameskip-v4", max_num_frames_per_episode=403)), noop_max=0)

    ends = {}
    for vec_env_class in (DummyVecEnv, AleVecEnv):
        env = vec_env_class([make_env])
        env.reset()
        ends[vec_env_class] = []
        for t in range(250):
            _, _, dones, infos = env.step(np.array([0]))
            if dones[0]:
                ends[vec_env_class].append((t, describe(infos[0]), infos[0]["terminal_observation"].shape))
        env.close()
    assert ends[DummyVecEnv] == ends[AleVecEnv]
    assert [end[1][2] for end in ends[AleVecEnv]] == [True, True]


@pytest.mark.parametrize("limit", [None, 0])
def test_a_game_without_a_limit(limit):
    make = lambda: AtariWrapper(Monitor(gym.make("PongNoFrameskip-v4", max_num_frames_per_episode=limit)))  # noqa: E731
    env = AleVecEnv([make])
    env.reset()
    assert not any(env.step(np.array([0]))[2][0] for _ in range(20))
    env.close()


def test_what_monitor_adds_to_episodes(tmp_path):
    kwargs = {"max_num_frames_per_episode": 200}, {"info_keywords": ("lives", "frame_number")}
    rows = []
    for vec_env_cls in (DummyVecEnv, AleVecEnv):
        folder = tmp_path / vec_env_cls.__name__
        env = make_atari_env(
            "PongNoFrameskip-v4", 1, monitor_dir=str(folder), env_kwargs=kwargs[0], monitor_kwargs=kwargs[1],
            wrapper_kwargs={"noop_max": 0}, vec_env_cls=vec_env_cls,
        )  # fmt: skip
        env.reset()
        episodes = [info["episode"] for _ in range(60) for info in env.step(np.array([0]))[3] if "episode" in info]
        env.close()
        rows.append(load_results(str(folder)).drop(columns=["t", "index"]).to_dict("records"))
        assert [{name: value for name, value in row.items() if name != "t"} for row in episodes] == rows[-1]
    assert rows[0] == rows[1] and [(row["lives"], row["frame_number"]) for row in rows[0]] == [(0, 200)]


def test_seeds_and_no_ops():
    """Like SB3's, the number of no-ops is at most 30, and follows from the seed."""

    def count_frames(seed):
        env = make_atari_env("SpaceInvadersNoFrameskip-v4", 4, seed=seed, vec_env_cls=AleVecEnv)
        env.reset()
        frames = [info["episode_frame_number"] for info in env.reset_infos]
        env.close()
        return frames

    # A game without FIRE at reset would begin at the no-ops; here two actions of four frames follow
    frames = count_frames(1)
    assert frames == count_frames(1)
    assert frames != count_frames(2)
    assert set(frames) <= set(range(8, 39))
    assert len(set(frames)) > 2


def test_actions_that_the_game_does_not_have():
    """The engine's threads would not answer."""
    env = make_atari_env("PongNoFrameskip-v4", 2, seed=0, vec_env_cls=AleVecEnv)
    env.reset()
    for actions in ([99, 0], [0, -1], [0], [0.0, 1.0], [[0], [1]]):
        with pytest.raises(ValueError, match="need an action each, whole numbers from 0 to 5"):
            env.step(np.array(actions))
    env.step([0, 5])
    env.close()


def test_lanes_that_no_vec_env_can_have():
    def make(game, **kwargs):
        return lambda: AtariWrapper(gym.make(f"{game}NoFrameskip-v4"), **kwargs)

    for other in (make("Breakout"), make("Pong", screen_size=42)):
        with pytest.raises(ValueError, match="All lanes need the same spaces: lane 0 has"):
            AleVecEnv([make("Pong"), other])
    with pytest.raises(ValueError, match="needs at least one env"):
        AleVecEnv([])
    with pytest.raises(ValueError, match="at least one pixel, and have 0x0"):
        AleVecEnv([make("Pong", screen_size=0)])


def test_no_game_stalls_after_a_lost_life():
    """Breakout waits for FIRE, which no action below is."""
    env = make_atari_env("BreakoutNoFrameskip-v4", 1, seed=0, vec_env_cls=AleVecEnv)
    env.reset()
    lives = []
    for _ in range(400):
        _, _, dones, infos = env.step(np.array([0]))
        if dones[0]:
            lives.append(infos[0]["lives"])
    assert lives[:6] == [4, 3, 2, 1, 0, 4]
    env.close()


def test_wrappers_monitor_files_and_evaluation(tmp_path):
    env = make_atari_env("BreakoutNoFrameskip-v4", 2, seed=0, vec_env_cls=AleVecEnv, monitor_dir=str(tmp_path))
    assert env.env_is_wrapped(Monitor) == env.env_is_wrapped(EpisodicLifeEnv) == [True, True]
    assert env.env_is_wrapped(FireResetEnv, indices=[1]) == [True]
    assert env.env_is_wrapped(gym.wrappers.TimeLimit) == env.env_is_wrapped(StickyActionEnv) == [False, False]
    sticky = make_atari_env(
        "BreakoutNoFrameskip-v4", 1, wrapper_kwargs={"action_repeat_probability": 0.25}, vec_env_cls=AleVecEnv
    )
    assert sticky.env_is_wrapped(StickyActionEnv) == [True]
    sticky.close()
    stacked = VecTransposeImage(VecFrameStack(env, 4))
    model = AsyncOneStepQ("CnnPolicy", stacked, seed=0)
    returns, lengths = evaluate_policy(model, stacked, n_eval_episodes=2, return_episode_rewards=True)
    env.close()
    written = load_results(str(tmp_path))
    # The second env may have finished an episode that was not needed
    assert set(zip(returns, lengths, strict=True)) <= set(zip(written["r"], written["l"], strict=True))
    assert len(returns) == 2


def test_learning(algorithm):
    def list_threads():
        return {thread.id for thread in psutil.Process().threads()}

    # The first time, PyTorch starts some that stay
    for _ in range(2):
        threads_before = list_threads()
        env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", 3, seed=0, vec_env_cls=AleVecEnv), 4)
        model = algorithm("CnnPolicy", env, n_workers=3, policy_kwargs={"features_extractor_class": NipsCNN})
        model.learn(45)
        assert model.learn(30, reset_num_timesteps=False).num_timesteps == 75
        assert model.get_env().unwrapped is env.venv
        observation, _, _, infos = env.step(np.zeros(3, dtype=int))
        assert observation.shape == (3, 84, 84, 4)
        # The whole is where its parts left it, after at most 30 no-ops each; threads need not share the steps equally
        assert 0 <= sum(info["frame_number"] for info in infos) - 4 * (75 + 3) <= 3 * 30
        env.close()
    wait_until(lambda: list_threads() <= threads_before)


def test_reset_after_an_interrupted_step():
    """What was on its way is not taken for the answer to a later step."""
    original, replacement = make_both("Breakout", noop_max=0)
    original.reset()
    replacement.reset()
    replacement.step(np.array([2, 2]))
    replacement.step_async(np.array([2, 2]))
    with pytest.raises(RuntimeError, match="The last step was interrupted before its end: reset the environment"):
        replacement.step(np.array([2, 2]))
    replacement.reset()
    for t in range(30):
        _, _, _, infos = original.step(np.array([t % 4] * 2))
        _, _, _, other_infos = replacement.step(np.array([t % 4] * 2))
        assert list(map(describe, infos)) == list(map(describe, other_infos))
    original.close()
    replacement.close()


def test_lanes_differ_without_a_seed():
    env = AleVecEnv([lambda: AtariWrapper(gym.make("SpaceInvadersNoFrameskip-v4"))] * 10)
    env.reset()
    assert len({info["episode_frame_number"] for info in env.reset_infos}) > 2
    env.close()


def test_images():
    env = make_atari_env("PongNoFrameskip-v4", 2, vec_env_cls=AleVecEnv)
    assert not np.any(env.get_images())
    observations = env.reset()
    assert env.render_mode == "rgb_array"
    images = env.get_images()
    assert all((image == obs).all() for image, obs in zip(images, observations, strict=True))
    # One above the other
    assert env.render().shape == (168, 84, 3)
    env.close()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: gym.make("CartPole-v1"), "is not an Atari env"),
        (lambda: gym.make("PongNoFrameskip-v4"), "wrap it in AtariWrapper"),
        (lambda: AtariWrapper(gym.make("ALE/Pong-v5")), "frameskip=4"),
        (lambda: AtariWrapper(gym.make("PongNoFrameskip-v4", mode=1)), "made with mode=1"),
        (lambda: AtariWrapper(gym.make("PongNoFrameskip-v4", obs_type="grayscale")), "made with obs_type='grayscale'"),
        (lambda: AtariWrapper(gym.make("PongNoFrameskip-v4", render_mode="human")), "made with render_mode='human'"),
        (
            lambda: gym.wrappers.TimeLimit(AtariWrapper(gym.make("PongNoFrameskip-v4")), 9),
            "wrapper .*TimeLimit is not supported",
        ),
        (
            lambda: AtariWrapper(
                gym.make("PongNoFrameskip-v4", repeat_action_probability=0.1), action_repeat_probability=0.1
            ),
            "both the env itself and a wrapper repeat actions",
        ),
        (
            lambda: Monitor(AtariWrapper(gym.make("PongNoFrameskip-v4"))),
            "are Monitor, ClipRewardEnv, .* not the order of",
        ),
        (
            lambda: AtariWrapper(NoopResetEnv(MaxAndSkipEnv(Monitor(gym.make("PongNoFrameskip-v4")))), frame_skip=1),
            "not the order of make_atari_env",
        ),
        (
            lambda: AtariWrapper(MaxAndSkipEnv(Monitor(gym.make("PongNoFrameskip-v4")))),
            "not the order of make_atari_env",
        ),
        (lambda: AtariWrapper(Monitor(ShapedPong("pong", frameskip=1))), "is not an Atari env of ale_py"),
        (
            lambda: AtariWrapper(Monitor(gym.make("PongNoFrameskip-v4"), info_keywords=("is_success", "lives"))),
            "info_keywords contain is_success, and the engine's infos have",
        ),
        (lambda: AtariWrapper(Monitor(gym.make("PongNoFrameskip-v4"), allow_early_resets=False)), "early resets"),
    ],
)
def test_what_it_refuses(make, reason, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    with pytest.raises(ValueError, match=f"AleVecEnv can't replace this env: .*{reason}.*DummyVecEnv"):
        AleVecEnv([make])


def test_there_are_no_envs_to_ask():
    env = make_atari_env("PongNoFrameskip-v4", 2, vec_env_cls=AleVecEnv)
    assert [spec.id for spec in env.get_attr("spec")] == ["PongNoFrameskip-v4"] * 2
    with pytest.raises(AttributeError, match="'ale', only render_mode, spec"):
        env.get_attr("ale")
    with pytest.raises(NotImplementedError, match="DummyVecEnv has"):
        env.set_attr("spec", None)
    with pytest.raises(NotImplementedError, match="'clone_state'"):
        env.env_method("clone_state")
    env.close()
    games = ("PongNoFrameskip-v4", "SpaceInvadersNoFrameskip-v4")
    env = AleVecEnv([lambda game=game: AtariWrapper(Monitor(gym.make(game))) for game in games])
    assert [spec.id for spec in env.get_attr("spec", indices=[1, 0])] == [*reversed(games)]
    env.close()


@pytest.mark.parametrize("by", ["env", "wrapper"])
def test_sticky_actions(by):
    """An agent that plays the same actions sees another game if they are repeated at random."""
    options = {"wrapper_kwargs": {"action_repeat_probability": 0.5, "noop_max": 0}}
    if by == "env":
        options = {"env_kwargs": {"repeat_action_probability": 0.5}, "wrapper_kwargs": {"noop_max": 0}}
    env = make_atari_env("PongNoFrameskip-v4", 2, seed=0, vec_env_cls=AleVecEnv, **options)
    env.reset()
    # Up and down by turns: without chance, both games were the same
    for t in range(50):
        observations = env.step(np.full(2, 2 + t % 2))[0]
    assert (observations[0] != observations[1]).any()
    env.close()


@pytest.mark.parametrize(
    ("env_id", "kwargs", "warns"),
    [
        ("ALE/Pong-v5", {}, True),
        ("Pong-v4", {}, True),
        ("ALE/Pong-v5", {"frameskip": 1}, False),
        ("PongNoFrameskip-v4", {}, False),
    ],
)
def test_frames_that_are_skipped_twice(env_id, kwargs, warns, recwarn):
    env = VecFrameStack(make_atari_env(env_id, 2, env_kwargs=kwargs), 4)
    AsyncOneStepQ("CnnPolicy", env, n_workers=1).learn(4)
    warnings = [str(warning.message) for warning in recwarn if "skips frames itself" in str(warning.message)]
    assert [warning.startswith(f"{env_id} skips") for warning in warnings] == [True] * warns
