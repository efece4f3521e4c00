"""Histograms of a model for TensorBoard."""

from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_async1step.nodes.reported_steps import NotCarried
from sb3_async1step.parameter_checks import check_whole

#: Outputs of SB3's logger that can't show a histogram
TEXT_OUTPUTS = ("stdout", "log", "json", "csv")


class HistogramCallback(BaseCallback):
    """
    Writes histograms to TensorBoard: of the weights, of the gradient of the last update, and of the values of the
    current observations (all Q-values, or A3C's state values). Of a model whose lanes are in a ``RayVecEnv``, the
    weights only: gradients and observations stay on the nodes.

    :param freq: environment steps, over all lanes, between two sets of histograms; they are written with the next log
    :param verbose: see :class:`BaseCallback <stable_baselines3.common.callbacks.BaseCallback>`
    :raises ValueError: if ``freq`` is not a whole number of at least 1
    """

    def __init__(self, freq: int = 10_000, verbose: int = 0) -> None:
        super().__init__(verbose)
        check_whole(freq=freq)
        self.freq = freq
        # When it last wrote histograms
        self._last_timesteps = 0

    def _on_training_start(self) -> None:
        self._last_timesteps = self.num_timesteps

    def _on_step(self) -> bool:
        if self.num_timesteps // self.freq > self._last_timesteps // self.freq:
            self._last_timesteps = self.num_timesteps
            # Waits for the updates that workers still apply, and fetches what nodes have learned
            self.model.get_parameters()
            self._record_parameters()
            # As the callback of an EvalCallback, it has no locals
            observations = self.locals.get("new_obs")
            if observations is None:
                observations = self.model._last_obs
            if observations is not None and not isinstance(observations, NotCarried):
                self._record_values(observations)
        return True

    def _record_parameters(self) -> None:
        # Copies: workers change the parameters before the next log
        for name, parameter in self.model.policy.named_parameters():
            self._record(f"weights/{name}", parameter.detach().clone())
            if parameter.grad is not None:
                self._record(f"gradients/{name}", parameter.grad.clone())

    def _record_values(self, observations: Any) -> None:
        policy: Any = self.model.policy
        observations, _ = policy.obs_to_tensor(observations)
        with th.no_grad():
            if isinstance(policy, ActorCriticPolicy):
                self._record("values", policy.predict_values(observations))
            else:
                self._record("q_values", policy.q_net(observations))

    def _record(self, name: str, values: th.Tensor) -> None:
        self.logger.record(f"histograms/{name}", values, exclude=TEXT_OUTPUTS)
