"""What an Atari env and its wrappers do, read from them for the engine that reproduces it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import gymnasium as gym
from ale_py.env import AtariEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker
from stable_baselines3.common.atari_wrappers import (
    AtariWrapper,
    ClipRewardEnv,
    EpisodicLifeEnv,
    FireResetEnv,
    MaxAndSkipEnv,
    NoopResetEnv,
    StickyActionEnv,
    WarpFrame,
)
from stable_baselines3.common.env_util import unwrap_wrapper
from stable_baselines3.common.monitor import Monitor, ResultsWriter

from sb3_async1step.sb3_internals import read_frame_skip, read_options

# Values of AtariEnv's options with which the engine can reproduce it
NEEDED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "mode": (None,),
    "difficulty": (None,),
    "continuous": (False,),
    "obs_type": ("rgb",),
    "render_mode": (None, "rgb_array"),
}
# Wrappers that change nothing that the learner sees
TRANSPARENT = (AtariWrapper, PassiveEnvChecker, OrderEnforcing)
# From the outermost to the innermost, as make_atari_env() and AtariWrapper put them around an env
REPRODUCED = (
    ClipRewardEnv,
    WarpFrame,
    FireResetEnv,
    EpisodicLifeEnv,
    MaxAndSkipEnv,
    NoopResetEnv,
    StickyActionEnv,
    Monitor,
)
# What the engine says of a step
INFO_KEYWORDS = {"lives", "frame_number", "episode_frame_number"}
# For the engine, no limit is one that is never reached
NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class AtariSettings:
    """
    Settings that :class:`~sb3_async1step.vec_envs.ale_vec_env.AleVecEnv` reads from an Atari env and its wrappers.

    :param game: name of the ROM
    :param frame_skip: number of frames for which an action is repeated
    :param pools_frames: whether an observation is the maximum of the last two frames
    :param screen_size: height and width of an observation, in pixels
    :param noop_max: maximum number of no-ops, of one frame each, after a reset
    :param fires_after_reset: whether the actions 1 and 2 are taken after a reset
    :param ends_on_life_loss: whether the learner's episode ends with each life
    :param clips_rewards: whether rewards are replaced by their signs
    :param repeat_action_probability: probability, for each frame, of repeating the previous action (sticky actions)
    :param has_sticky_wrapper: whether a wrapper repeats them, and not the env itself
    :param max_frames: number of frames after which an episode is truncated
    :param full_action_space: whether all 18 actions are allowed
    :param info_keywords: what ``Monitor`` adds to the information about an episode
    """

    game: str
    frame_skip: int
    pools_frames: bool
    screen_size: int
    noop_max: int
    fires_after_reset: bool
    ends_on_life_loss: bool
    clips_rewards: bool
    repeat_action_probability: float
    has_sticky_wrapper: bool
    max_frames: int
    full_action_space: bool
    info_keywords: tuple[str, ...] = ()


def list_wrappers(env: gym.Env) -> Iterable[gym.Wrapper]:
    """
    :param env: an env with its wrappers
    :return: the wrappers, from the outermost to the innermost
    """
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env


def read_settings(env: gym.Env) -> AtariSettings:
    """
    :param env: an Atari env with its wrappers
    :return: the settings that the engine has to reproduce
    :raises ValueError: if the engine cannot reproduce them; the message says what and why
    """
    base = env.unwrapped
    if type(base) is not AtariEnv:
        _refuse(f"{base} is not an Atari env of ale_py")
    wrappers = read_wrappers(env)
    if WarpFrame not in wrappers:
        _refuse("its observations have to be small grey images: wrap it in AtariWrapper")
    warp = wrappers[WarpFrame]
    if warp.width < 1:
        _refuse(f"its observations need at least one pixel, and have {warp.width}x{warp.height}")
    if warp.width != warp.height:
        _refuse(f"its observations have to be square, and have {warp.width}x{warp.height} pixels")
    options = read_options(base)
    for name, allowed in NEEDED_OPTIONS.items():
        if options[name] not in allowed:
            _refuse(f"it was made with {name}={options[name]!r}, which is not supported")
    if options["frameskip"] != 1:
        _refuse(f"it skips frames itself (frameskip={options['frameskip']}): use the id that ends in NoFrameskip-v4")
    monitor = wrappers.get(Monitor)
    if monitor is not None:
        check_monitor(monitor)
    sticky = getattr(wrappers.get(StickyActionEnv), "action_repeat_probability", 0.0)
    if sticky and options["repeat_action_probability"]:
        _refuse("both the env itself and a wrapper repeat actions at random")
    return AtariSettings(
        game=options["game"],
        frame_skip=read_frame_skip(wrappers[MaxAndSkipEnv]) if MaxAndSkipEnv in wrappers else 1,
        pools_frames=MaxAndSkipEnv in wrappers,
        screen_size=warp.width,
        noop_max=wrappers[NoopResetEnv].noop_max if NoopResetEnv in wrappers else 0,
        fires_after_reset=FireResetEnv in wrappers,
        ends_on_life_loss=EpisodicLifeEnv in wrappers,
        clips_rewards=ClipRewardEnv in wrappers,
        repeat_action_probability=sticky or options["repeat_action_probability"],
        has_sticky_wrapper=StickyActionEnv in wrappers,
        max_frames=options["max_num_frames_per_episode"] or base.ale.getInt("max_num_frames_per_episode") or NO_LIMIT,
        full_action_space=options["full_action_space"],
        info_keywords=monitor.info_keywords if monitor is not None else (),
    )


def read_wrappers(env: gym.Env) -> dict[type, Any]:
    """
    :param env: an Atari env with its wrappers
    :return: those that change something, by their classes
    :raises ValueError: if the engine cannot reproduce one of them, or if their order is not that of ``make_atari_env``
    """
    wrappers = [wrapper for wrapper in list_wrappers(env) if type(wrapper) not in TRANSPARENT]
    kinds: list[Any] = [type(wrapper) for wrapper in wrappers]
    unknown = [kind.__name__ for kind in kinds if kind not in REPRODUCED]
    if unknown:
        _refuse(f"its wrapper {unknown[0]} is not supported")
    places = [REPRODUCED.index(kind) for kind in kinds]
    if places != sorted(set(places)):
        _refuse(
            f"its wrappers, from the outermost to the innermost, are {', '.join(kind.__name__ for kind in kinds)}, "
            f"which is not the order of make_atari_env ({', '.join(kind.__name__ for kind in REPRODUCED)})"
        )
    return dict(zip(kinds, wrappers, strict=True))


def check_monitor(monitor: Monitor) -> None:
    """
    :param monitor: the wrapper
    :raises ValueError: if it logs what the engine does not report, or restricts resets
    """
    unknown = sorted(set(monitor.info_keywords) - INFO_KEYWORDS)
    if unknown:
        _refuse(
            f"Monitor's info_keywords contain {', '.join(unknown)}, and the engine's infos have only "
            f"{', '.join(sorted(INFO_KEYWORDS))}"
        )
    if monitor.reset_keywords or not monitor.allow_early_resets:
        _refuse("Monitor has reset_keywords, or does not allow early resets")


def list_reproduced(settings: AtariSettings) -> list[type[gym.Wrapper]]:
    """
    :param settings: settings of an env
    :return: the wrappers whose work is done for this env
    """
    optional = {
        StickyActionEnv: settings.has_sticky_wrapper,
        NoopResetEnv: settings.noop_max > 0,
        MaxAndSkipEnv: settings.pools_frames,
        EpisodicLifeEnv: settings.ends_on_life_loss,
        FireResetEnv: settings.fires_after_reset,
        ClipRewardEnv: settings.clips_rewards,
    }
    return [Monitor, AtariWrapper, WarpFrame, *(wrapper for wrapper, is_on in optional.items() if is_on)]


def find_results_writer(env: gym.Env) -> ResultsWriter | None:
    """
    :param env: an env with its wrappers
    :return: the writer of its monitor file, None if it has no such file
    """
    monitor = unwrap_wrapper(env, Monitor)
    return monitor.results_writer if isinstance(monitor, Monitor) else None


def _refuse(reason: str) -> NoReturn:
    raise ValueError(f"AleVecEnv can't replace this env: {reason}. DummyVecEnv and SubprocVecEnv can run it as it is.")
