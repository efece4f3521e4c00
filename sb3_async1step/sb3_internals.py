"""Names of other packages that are not public, or might change: all that we rely on is here."""

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ProgressBarCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv


def find_lane_of_exception(exception: BaseException) -> int | None:
    """
    :param exception: an exception of a ``VecEnv.step()``
    :return: the lane that it came from, None if it is not known
    """
    traceback = exception.__traceback__
    while traceback is not None:
        # DummyVecEnv steps its environments in a loop, whose variable tells which of them raised the exception
        if traceback.tb_frame.f_code is DummyVecEnv.step_wait.__code__:
            return traceback.tb_frame.f_locals.get("env_idx")
        traceback = traceback.tb_next
    return None


def close_progress_bars(callback: BaseCallback) -> None:
    """
    Close the progress bars that SB3 leaves open when the training fails.

    :param callback: the callback of the training
    """
    if isinstance(callback, CallbackList):
        for child in callback.callbacks:
            close_progress_bars(child)
    elif isinstance(callback, ProgressBarCallback) and hasattr(callback, "pbar"):
        callback.on_training_end()


def dump_logs_by_episodes(algorithm: BaseAlgorithm) -> None:
    """
    Write SB3's log data of an off-policy algorithm, from what every algorithm has.

    :param algorithm: any algorithm
    """
    OffPolicyAlgorithm.dump_logs(algorithm)  # type: ignore[arg-type]


def dump_logs_by_iterations(algorithm: BaseAlgorithm, iteration: int) -> None:
    """
    Write SB3's log data of an on-policy algorithm, from what every algorithm has.

    :param algorithm: any algorithm
    :param iteration: number of rollouts
    """
    OnPolicyAlgorithm.dump_logs(algorithm, iteration)  # type: ignore[arg-type]
