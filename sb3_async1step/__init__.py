"""The asynchronous methods of Mnih et al. (2016) for Stable-Baselines3."""

from importlib.resources import files

from sb3_async1step.a3c import A3C
from sb3_async1step.async_n_step_q import AsyncNStepQ
from sb3_async1step.async_one_step_q import AsyncOneStepQ
from sb3_async1step.async_one_step_sarsa import AsyncOneStepSarsa
from sb3_async1step.callbacks import BackgroundEvalCallback, HistogramCallback
from sb3_async1step.common.optimizers import SharedRMSprop
from sb3_async1step.common.torch_layers import LayerNormNatureCNN, MinAtarCNN, NipsCNN
from sb3_async1step.nodes.ray_vec_env import RayVecEnv
from sb3_async1step.vec_envs.healing_vec_env import HealingVecEnv
from sb3_async1step.vec_envs.split import rejoin_vec_env, split_vec_env

__version__ = (files(__name__) / "version.txt").read_text().strip()

__all__ = [
    "A3C",
    "AsyncNStepQ",
    "AsyncOneStepQ",
    "AsyncOneStepSarsa",
    "BackgroundEvalCallback",
    "HealingVecEnv",
    "HistogramCallback",
    "LayerNormNatureCNN",
    "MinAtarCNN",
    "NipsCNN",
    "RayVecEnv",
    "SharedRMSprop",
    "__version__",
    "rejoin_vec_env",
    "split_vec_env",
]
