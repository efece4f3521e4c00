"""The steps that nodes have reported, as callbacks get them."""

from collections import deque
from typing import Any

import numpy as np

from sb3_async1step.nodes.messages import Report
from sb3_async1step.workers.transitions import Transitions, UpdateStats


class NotCarried:
    """
    Takes the place of what stays on the nodes.

    :param name: what a callback knows it as
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"locals['{self._name}'] stays on the nodes of a RayVecEnv: callbacks get 'dones' and the 'infos' of "
            "finished episodes."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and not name.startswith("__array"):
            raise AttributeError(name)
        return self._refuse()

    __array__ = __getitem__ = __iter__ = __len__ = __bool__ = __float__ = __eq__ = _refuse
    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __matmul__ = __rmatmul__ = _refuse
    __neg__ = __pos__ = __abs__ = __int__ = __round__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class ReportedSteps:
    """The steps that nodes have reported, on their way to callbacks."""

    def __init__(self) -> None:
        self._dones: deque[bool] = deque()
        self._infos: deque[dict[str, Any]] = deque()
        self._updates: list[UpdateStats] = []

    def __len__(self) -> int:
        return len(self._dones)

    def add(self, report: Report) -> None:
        """
        :param report: what a node has reported
        """
        self._dones.extend(report.dones.tolist())
        self._infos.extend(report.infos)
        self._updates.extend(report.updates)

    def take(self, n_steps: int) -> Transitions:
        """
        :param n_steps: number of steps, or more than there are
        :return: so many of them
        """
        n_steps = min(n_steps, len(self))
        dones = np.array([self._dones.popleft() for _ in range(n_steps)], dtype=bool)
        infos = [self._infos.popleft() if done else {} for done in dones]
        updates, self._updates = self._updates, []
        actions, new_obs, rewards = (NotCarried(name) for name in ("actions", "new_obs", "rewards"))
        return Transitions(actions, new_obs, rewards, dones, infos, updates)  # type: ignore[arg-type]
