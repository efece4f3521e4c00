from sb3_async1step.async_one_step_sarsa.async_one_step_sarsa import AsyncOneStepSarsa
from sb3_async1step.async_one_step_sarsa.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["AsyncOneStepSarsa", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
