"""Atari games in ale_py's C++ engine, which emulates several games at the same time, unlike threads of Python."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from ale_py.vector_env import AtariVectorEnv
from gymnasium import spaces
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from sb3_async1step.vec_envs.atari_settings import AtariSettings, find_results_writer, list_reproduced, read_settings
from sb3_async1step.vec_envs.split import split_vec_env, take_lanes

NOOP, FIRE, SECOND_ACTION_AFTER_RESET = 0, 1, 2


def make_engine(settings: AtariSettings) -> AtariVectorEnv:
    """
    :param settings: settings of an env
    :return: an engine with one game and one thread, which has to be reset with a seed first
    """
    return AtariVectorEnv(
        settings.game,
        num_envs=1,
        num_threads=1,
        max_num_frames_per_episode=settings.max_frames,
        repeat_action_probability=settings.repeat_action_probability,
        full_action_space=settings.full_action_space,
        img_height=settings.screen_size,
        img_width=settings.screen_size,
        stack_num=1,
        frameskip=settings.frame_skip,
        maxpool=settings.pools_frames,
        # The engine draws from 0 to noop_max - 1
        noop_max=settings.noop_max + 1 if settings.noop_max > 0 else 0,
        # With these options, the engine would differ from the wrappers
        episodic_life=False,
        life_loss_info=False,
        reward_clipping=False,
        use_fire_reset=False,
    )


class AleLane:
    """
    One game, with the semantics of ``Monitor`` and ``AtariWrapper``.

    :param settings: settings of the env that it replaces
    :param results_writer: writer of the monitor file of that env, None for no file
    :param attributes: what can be asked of that env
    """

    def __init__(
        self, settings: AtariSettings, results_writer: ResultsWriter | None, attributes: dict[str, Any]
    ) -> None:
        self.settings = settings
        self.results_writer = results_writer
        self.attributes = attributes
        self._start = time.time()
        self._lives = 0
        self._return = 0.0
        self.reset_info: dict[str, Any] = {}
        # What render() shows before the first reset
        self.image = np.zeros((settings.screen_size, settings.screen_size, 1), dtype=np.uint8)
        self._start_engine()

    def _start_engine(self) -> None:
        self.engine = make_engine(self.settings)
        # The random generator of a new engine always has the same state. A seed changes that, but makes the engine load
        # the game again, which takes time
        self._needs_seed = True
        # True between send() and the end of receive()
        self._is_stepping = False
        self._game_is_over = True

    def reset(self, seed: int | None = None) -> np.ndarray:
        """
        Begin an episode as the wrappers do: after the loss of a life, the game goes on.

        :param seed: seed of the game's random generator, None to leave it unchanged
        :return: the first observation; its info is in ``reset_info``
        """
        if self._is_stepping:
            # Ctrl-C interrupted the step: it is not known whether the engine will still answer
            self._start_engine()
        obs, info = self._begin_episode(seed)
        if self.settings.fires_after_reset:
            for action in (FIRE, SECOND_ACTION_AFTER_RESET):
                self.send(action)
                obs, _, done, info = self._finish_step()
                if done:
                    _, info = self._begin_episode(seed)
        self.reset_info = info
        return obs

    def _begin_episode(self, seed: int | None) -> tuple[np.ndarray, dict[str, Any]]:
        """Do what ``EpisodicLifeEnv.reset()`` does."""
        if self.settings.ends_on_life_loss and not self._game_is_over:
            # Leave the state in which the life was lost
            self.send(NOOP)
            obs, _, _, info = self._finish_step()
            if not self._game_is_over:
                return obs, info
        if seed is None and self._needs_seed:
            seed = int(np.random.default_rng().integers(2**31))
        self._needs_seed = False
        # SB3's seeds have 32 bits, those of the engine 31
        observations, infos = self.engine.reset(seed=None if seed is None else seed % 2**31)
        info = {name: int(values[0]) for name, values in infos.items() if name != "env_id"}
        self._game_is_over = False
        self._return = 0.0
        self._lives = info["lives"]
        return self._to_image(observations), info

    def send(self, action: int) -> None:
        """
        Let the engine's thread begin a step.

        :param action: the action
        :raises RuntimeError: if the last step was interrupted before its end
        """
        if self._is_stepping:
            raise RuntimeError("The last step was interrupted before its end: reset the environment.")
        self._is_stepping = True
        self.engine.send(np.array([action]))

    def receive(self) -> tuple[np.ndarray, float, bool, dict[str, Any]]:
        """
        Wait for the end of the step.

        :return: observation, reward, whether the learner's episode ended, and info. If it ended, the observation is the
            first of the next episode
        """
        obs, reward, done, info = self._finish_step()
        if done:
            info["terminal_observation"] = obs
            obs = self.reset()
        return obs, reward, done, info

    def _finish_step(self) -> tuple[np.ndarray, float, bool, dict[str, Any]]:
        """Return what ``step()`` of ``Monitor``, ``EpisodicLifeEnv`` and ``ClipRewardEnv`` would return."""
        observations, rewards, terminated, truncated, infos = self.engine.recv()
        self._is_stepping = False
        info: dict[str, Any] = {name: int(values[0]) for name, values in infos.items() if name != "env_id"}
        reward = float(rewards[0])
        self._return += reward
        self._game_is_over = bool(terminated[0] or truncated[0])
        if self._game_is_over:
            info["episode"] = self._finish_game(info)
        lost_life = self.settings.ends_on_life_loss and 0 < info["lives"] < self._lives
        self._lives = info["lives"]
        info["TimeLimit.truncated"] = bool(truncated[0]) and not (terminated[0] or lost_life)
        if self.settings.clips_rewards:
            reward = float(np.sign(reward))
        return self._to_image(observations), reward, self._game_is_over or lost_life, info

    def _finish_game(self, info: dict[str, Any]) -> dict[str, float]:
        # Monitor is the innermost wrapper: it counts frames as well
        episode = {"r": self._return, "l": info["episode_frame_number"], "t": round(time.time() - self._start, 6)}
        episode.update((name, info[name]) for name in self.settings.info_keywords)
        if self.results_writer is not None:
            self.results_writer.write_row(episode)
        return episode

    def _to_image(self, observations: np.ndarray) -> np.ndarray:
        self.image = observations.reshape(self.settings.screen_size, self.settings.screen_size, 1)
        return self.image

    def close(self) -> None:
        """Stop the engine's thread, and close the monitor file."""
        del self.engine
        if self.results_writer is not None:
            self.results_writer.close()


class AleVecEnv(VecEnv):
    """
    Atari games in ale_py's C++ engine, with a thread of the engine for each lane. The games of a worker are emulated at
    the same time, and while other workers learn.

    It replaces ``DummyVecEnv`` and ``SubprocVecEnv``::

        make_atari_env("PongNoFrameskip-v4", n_envs=16, vec_env_cls=AleVecEnv)

    :param env_fns: functions that make Atari envs with an ``AtariWrapper``; their settings are read, but they are not
        stepped
    :raises ValueError: if the engine cannot reproduce an env, there is none, or the lanes' spaces differ
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]) -> None:
        if len(env_fns) == 0:
            raise ValueError("AleVecEnv needs at least one env.")
        envs = [make() for make in env_fns]
        for lane, env in enumerate(envs):
            if (env.observation_space, env.action_space) != (envs[0].observation_space, envs[0].action_space):
                raise ValueError(
                    f"All lanes need the same spaces: lane 0 has {envs[0].observation_space} and "
                    f"{envs[0].action_space}, lane {lane} has {env.observation_space} and {env.action_space}."
                )
        # Read all settings first: an env that cannot be replaced is refused before any engine starts
        settings = [read_settings(env) for env in envs]
        self.lanes = [
            AleLane(s, find_results_writer(env), {"render_mode": env.render_mode, "spec": env.spec})
            for s, env in zip(settings, envs, strict=True)
        ]
        super().__init__(len(envs), envs[0].observation_space, envs[0].action_space)

    def reset(self) -> np.ndarray:
        """
        :return: observations, shape ``(num_envs, screen_size, screen_size, 1)``
        """
        observations = [lane.reset(seed) for lane, seed in zip(self.lanes, self._seeds, strict=True)]
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [lane.reset_info for lane in self.lanes]
        return np.stack(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """
        :param actions: actions, shape ``(num_envs,)``
        :raises ValueError: if there is not one of the action space for each lane
        """
        actions = np.asarray(actions)
        assert isinstance(self.action_space, spaces.Discrete)
        # The engine's threads would never answer to others
        are_whole = actions.shape == (self.num_envs,) and actions.dtype.kind in "iu"
        if not are_whole or not np.all((actions >= 0) & (actions < self.action_space.n)):
            raise ValueError(
                f"{self.num_envs} lane(s) need an action each, whole numbers from 0 to {self.action_space.n - 1}, got "
                f"{actions}."
            )
        for lane, action in zip(self.lanes, actions.tolist(), strict=True):
            lane.send(action)

    def step_wait(self) -> VecEnvStepReturn:
        """
        :return: observations, rewards, dones and infos, as for every VecEnv
        """
        observations, rewards, dones, infos = zip(*[lane.receive() for lane in self.lanes], strict=True)
        self.reset_infos = [lane.reset_info for lane in self.lanes]
        return np.stack(observations), np.array(rewards, dtype=np.float32), np.array(dones), list(infos)

    def close(self) -> None:
        """Stop the engine's threads, and close the monitor files."""
        for lane in self.lanes:
            lane.close()
        self.lanes = []

    def get_images(self) -> list[np.ndarray]:
        """
        :return: for each lane the grey image that the agent sees, shape ``(screen_size, screen_size, 3)``
        """
        return [np.repeat(lane.image, 3, axis=-1) for lane in self.lanes]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """
        :param wrapper_class: class of a wrapper
        :param indices: lanes, None for all
        :return: for each lane, whether the work of this wrapper is done
        """
        settings = [self.lanes[i].settings for i in self._get_indices(indices)]
        return [wrapper_class in list_reproduced(s) for s in settings]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        :param attr_name: ``"render_mode"`` or ``"spec"``
        :param indices: lanes, None for all
        :return: the value of the attribute for each lane
        :raises AttributeError: for any other name, since the games run in the engine and there are no env objects
        """
        known = self.lanes[0].attributes
        if attr_name not in known:
            raise AttributeError(f"AleVecEnv has no envs to ask for '{attr_name}', only {', '.join(known)}.")
        return [self.lanes[i].attributes[attr_name] for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        :raises NotImplementedError: always, since there are no env objects
        """
        raise NotImplementedError("AleVecEnv has no envs whose attributes could be set; DummyVecEnv has.")

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """
        :raises NotImplementedError: always, since there are no env objects
        """
        raise NotImplementedError(f"AleVecEnv has no envs whose '{method_name}' could be called; DummyVecEnv has.")


@split_vec_env.register
def _(env: AleVecEnv, groups: Sequence[range]) -> list[VecEnv]:
    return [take_lanes(env, lanes, "lanes") for lanes in groups]
