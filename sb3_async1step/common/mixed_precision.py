"""Features extractors that compute in bfloat16."""

from functools import cached_property

import torch as th
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs


class MixedPrecision(BaseModel):
    """
    A mixin, listed after a class of SB3 among the bases of a policy or network, that extracts features.

    :cvar mixed_precision: whether the features extractor computes in bfloat16
    """

    mixed_precision: bool

    def extract_features(self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        """
        :param obs: observations
        :param features_extractor: the features extractor
        :return: the features, in float32 also with mixed precision, which is switched off for an export to ONNX
        """
        # Tools that run ONNX files seldom know bfloat16
        mixed_precision = self.mixed_precision and not th.onnx.is_in_onnx_export()
        preprocessed_obs = self._preprocess(obs, th.bfloat16 if mixed_precision else th.float32)
        if not mixed_precision:
            return features_extractor(preprocessed_obs)
        # Inside of another torch.autocast, its cache of converted weights would survive an update
        with th.autocast(self.device.type, dtype=th.bfloat16, cache_enabled=False):
            features = features_extractor(preprocessed_obs)
        return features.float()

    def _preprocess(self, obs: PyTorchObs, dtype: th.dtype) -> PyTorchObs:
        if not (self._normalizes_image and isinstance(obs, th.Tensor)):
            return preprocess_obs(obs, self.observation_space, normalize_images=self.normalize_images)
        # The same in place, which allocates less memory; bfloat16 represents every integer up to 255 exactly
        return obs.to(dtype, copy=True).div_(255.0)

    @cached_property
    def _normalizes_image(self) -> bool:
        return self.normalize_images and is_image_space(self.observation_space)
