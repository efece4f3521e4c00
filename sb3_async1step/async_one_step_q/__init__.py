from sb3_async1step.async_one_step_q.async_one_step_q import AsyncOneStepQ
from sb3_async1step.async_one_step_q.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["AsyncOneStepQ", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
