"""Sampling with a random generator of one's own, in code that knows only PyTorch's global one."""

from typing import Any

import torch as th
from torch.overrides import TorchFunctionMode

#: PyTorch's functions that take a generator, of those that ``torch.distributions`` and SB3's policies are made of
DRAWING_FUNCTIONS = frozenset(
    [
        "_sample_dirichlet",
        "_standard_gamma",
        "bernoulli",
        "bernoulli_",
        "binomial",
        "cauchy_",
        "exponential_",
        "geometric_",
        "log_normal_",
        "multinomial",
        "normal",
        "normal_",
        "poisson",
        "rand",
        "rand_like",
        "randint",
        "randint_like",
        "randn",
        "randn_like",
        "random_",
        "randperm",
        "uniform_",
    ]
)


class DrawFrom(TorchFunctionMode):
    """
    A context in which PyTorch draws from a given generator. It applies to the thread that enters it only.

    :param generator: the generator, of the device on which is drawn
    """

    def __init__(self, generator: th.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in DRAWING_FUNCTIONS and kwargs.get("generator") is None:
            kwargs = {**kwargs, "generator": self._generator}
        return func(*args, **kwargs)
