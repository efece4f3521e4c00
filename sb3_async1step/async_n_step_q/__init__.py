from sb3_async1step.async_n_step_q.async_n_step_q import AsyncNStepQ
from sb3_async1step.async_n_step_q.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["AsyncNStepQ", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
