"""The optimizer whose statistics all workers share."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch as th

from sb3_async1step.parameter_checks import check_not_negative, check_positive, check_unit_interval


class SharedRMSprop(th.optim.Optimizer):
    """
    Shared RMSProp: non-centred, without momentum, with epsilon inside the square root.

    All workers share one running average of squared gradients (Mnih et al. 2016, section 4, and equations 8 and 9 of
    its supplement):

    .. math:: g = \\alpha g + (1 - \\alpha) \\Delta\\theta^2, \\quad
              \\theta \\leftarrow \\theta - \\eta \\frac{\\Delta\\theta}{\\sqrt{g + \\epsilon}}

    The average starts at zero, whereas that of SB3's ``RMSpropTFLike`` starts at one. Steps work in place; only the
    first one allocates memory.

    :param params: parameters, or parameter groups
    :param lr: learning rate (eta)
    :param alpha: decay rate of the average of squared gradients
    :param eps: term that is added to the average before the square root is taken
    :raises ValueError: if a hyperparameter is out of range
    """

    #: Workers may apply their updates at the same time (Hogwild): it does no harm if one sees another's half applied
    is_lock_free: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[th.Tensor] | Iterable[dict[str, Any]],
        lr: float = 7e-4,
        alpha: float = 0.99,
        eps: float = 0.1,
    ) -> None:
        check_not_negative(lr=lr)
        check_unit_interval(alpha=alpha)
        # An average of zero would be divided by its root
        check_positive(eps=eps)
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps})
        # Scratch memory of this object, which is neither shared between workers nor saved
        self._denominators: dict[th.Tensor, th.Tensor] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._denominators = {}

    @th.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """
        Perform one update.

        :param closure: function that evaluates the model again and returns the loss
        :return: the loss, if there is a closure
        """
        loss = None
        if closure is not None:
            with th.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["alpha"], group["eps"])
        return loss

    def _update(self, parameter: th.Tensor, lr: float, alpha: float, eps: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["square_avg"] = th.zeros_like(parameter, memory_format=th.preserve_format)
        if parameter not in self._denominators:
            self._denominators[parameter] = th.empty_like(parameter, memory_format=th.preserve_format)
        square_avg, denominator = state["square_avg"], self._denominators[parameter]
        if parameter.is_complex():
            # Real and imaginary parts are parameters of their own, as PyTorch's optimizers see them
            parameter, gradient, square_avg, denominator = map(
                th.view_as_real, (parameter, gradient, square_avg, denominator)
            )

        square_avg.mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
        th.add(square_avg, eps, out=denominator).sqrt_()
        parameter.addcdiv_(gradient, denominator, value=-lr)


#: Those that ``sb3-async1step train -optimize`` tries
OPTIMIZERS = {"shared_rmsprop": SharedRMSprop, "adam": th.optim.Adam}
