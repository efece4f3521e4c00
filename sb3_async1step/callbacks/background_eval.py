"""Evaluating a model while it learns on."""

import copy
import math
import time
from contextvars import copy_context
from itertools import combinations
from threading import Thread, current_thread
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, sync_envs_normalization

from sb3_async1step.common.snapshot import Snapshot
from sb3_async1step.sb3_internals import evaluate_now, list_callbacks
from sb3_async1step.vec_envs.exceptions import add_note, advise_on_threads
from sb3_async1step.vec_envs.split import find_base
from sb3_async1step.workers.thread_pool import release_import_lock

#: Seconds that a training which has failed waits for the current step of an evaluation
EVALUATION_END_TIMEOUT = 1.0


class BackgroundEvalCallback(EvalCallback):
    """
    SB3's :class:`EvalCallback <stable_baselines3.common.callbacks.EvalCallback>`, but the training goes on meanwhile: a
    snapshot of the model plays on a thread of its own. It works with any algorithm of SB3.

    Files, logs and further callbacks are those of ``EvalCallback``. Each result is recorded at the step of its
    snapshot, which is what the file of the best model holds. ``callback_on_new_best`` and ``callback_after_eval`` are
    called on the thread that called ``learn()``, in its first step after the end of the evaluation; the model has
    learned on by then.

    There is one evaluation at a time: one that is due while another runs is skipped. At the end of the training,
    ``learn()`` waits for the evaluation that still runs. If a training by one of our algorithms fails or is
    interrupted, it is abandoned after its current step (see :meth:`stop` for SB3's).

    The parameters are those of ``EvalCallback``. Nothing else may use the evaluation env meanwhile: if it is the
    training env, ``learn()`` raises a ``ValueError``, and that of our algorithms also if it is another callback's.
    """

    # The one that is running, or whose result has not been looked at
    _evaluation: "Evaluation | None" = None

    def _init_callback(self) -> None:
        if share_envs(self.training_env, self.eval_env):
            raise ValueError(
                "The evaluation env is the training env, which is stepped meanwhile: BackgroundEvalCallback needs an "
                "env of its own."
            )
        # The training before may have failed, and its evaluation be in its last step
        self.stop()
        super()._init_callback()

    def _on_step(self) -> bool:
        if self._evaluation is not None and self._evaluation.has_ended and not self._publish():
            return False
        if self.eval_freq > 0 and self.n_calls % self.eval_freq == 0:
            self._begin_evaluation()
        return True

    def _on_training_end(self) -> None:
        if self._evaluation is None:
            return
        try:
            self._evaluation.wait()
        except BaseException:
            self.stop(EVALUATION_END_TIMEOUT)
            raise
        self._publish()

    def stop(self, timeout: float = math.inf) -> None:
        """
        Abandon the evaluation if one is running, and wait until it has made its current step. Our algorithms do so when
        ``learn()`` raises an exception. SB3's do not tell callbacks of that, and the evaluation goes on until it is
        finished: call this before you use or close the evaluation env.

        :param timeout: seconds to wait at most
        """
        if self._evaluation is not None:
            self._evaluation.is_abandoned = True
            if self._evaluation.wait(timeout):
                self._evaluation = None

    def _begin_evaluation(self) -> None:
        if self._evaluation is not None:
            if self.verbose >= 2:
                print(f"Eval num_timesteps={self.num_timesteps} is skipped, since another one is running")
            return
        # From here on the model stands still: our algorithms wait for the workers' steps before they answer
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.eval_env)
        self._evaluation = Evaluation(self)
        self._evaluation.begin()

    def _publish(self) -> bool:
        """
        Log what the evaluation has found, and call the callbacks that wait for it.

        :return: whether the training shall go on
        :raises BaseException: what the evaluation raised
        """
        evaluation, self._evaluation = self._evaluation, None
        assert evaluation is not None
        if isinstance(evaluation.exception, Abandoned):
            return True
        if evaluation.exception is not None:
            raise evaluation.exception
        self._dump(evaluation.logger, evaluation.num_timesteps)
        callbacks = [self.callback_on_new_best, self.callback] if evaluation.has_new_best else [self.callback]
        return all(callback.on_step() for callback in callbacks if callback is not None)

    def _dump(self, records: Logger, step: int) -> None:
        # A copy has the same outputs. What the training has recorded stays for its own next log
        logger = copy.copy(self.logger)
        logger.name_to_value = records.name_to_value
        logger.name_to_count = records.name_to_count
        logger.name_to_excluded = records.name_to_excluded
        logger.dump(step)


class Abandoned(Exception):
    """Nobody waits for the result of the evaluation any more."""


class Evaluation(Snapshot):
    """
    A snapshot that is evaluated on a thread of its own.

    The thread that waits for it may be interrupted anywhere, so it takes no lock, as it would with a
    ``threading.Event``.

    :param callback: evaluates its model
    """

    def __init__(self, callback: BackgroundEvalCallback) -> None:
        super().__init__(callback.model, with_file=callback.best_model_save_path is not None)
        self.is_abandoned = False
        self.has_ended = False
        self.has_new_best = False
        self.exception: BaseException | None = Abandoned()
        self._callback = callback
        # The callback as it is now, and as EvalCallback would be. What comes after the evaluation is the original's
        self._evaluator = copy.copy(callback)
        vars(self._evaluator).update(model=self, callback=None, callback_on_new_best=None)
        self._caller = current_thread()
        self._has_begun = False
        # In a copy of the caller's context (np.errstate, decimal's precision), as the workers
        self._thread = Thread(target=copy_context().run, args=(self._run,), name="evaluation")

    def begin(self) -> None:
        """Begin to play."""
        release_import_lock()
        self._thread.start()
        self._has_begun = True

    def wait(self, timeout: float = math.inf) -> bool:
        """
        :param timeout: seconds to wait at most
        :return: whether it is over, or never began because :meth:`begin` was interrupted
        """
        deadline = time.monotonic() + timeout
        while self._has_begun and not self.has_ended:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        if self._has_begun:
            self._thread.join()
        return True

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """
        :param args: positional arguments of the model's ``predict()``
        :param kwargs: keyword arguments of the model's ``predict()``
        :return: what that returns
        :raises Abandoned: if nobody waits for the result any more
        """
        self._check()
        return super().predict(*args, **kwargs)

    def _check(self) -> None:
        # The program, which waits for all threads before it exits, may have reached its end
        if self.is_abandoned or not self._caller.is_alive():
            raise Abandoned

    def _run(self) -> None:
        """Evaluate the snapshot (the target of the thread)."""
        self._has_begun = True
        try:
            self._check()
            self._evaluate()
            self.exception = None
        except BaseException as exception:
            self.exception = exception
            add_note(exception, f"Raised by the evaluation of the model as it was after {self.num_timesteps} steps.")
            advise_on_threads(exception, "an evaluation", "EvalCallback")
        finally:
            self.has_ended = True

    def _evaluate(self) -> None:
        best_before = self._callback.best_mean_reward
        evaluate_now(self._evaluator)
        self.has_new_best = self._evaluator.best_mean_reward > best_before
        # They and the files that were written must agree, also if the training fails before it publishes them
        self._callback.best_mean_reward = self._evaluator.best_mean_reward
        self._callback.last_mean_reward = self._evaluator.last_mean_reward


def share_envs(one: VecEnv, other: VecEnv) -> bool:
    """
    :param one: a VecEnv
    :param other: another one, perhaps
    :return: whether both step the same environments
    """
    first, second = ([base, *list_envs(base)] for base in (find_base(one), find_base(other)))
    return any(env is other_env for env in first for other_env in second)


def list_envs(env: VecEnv) -> list[Any]:
    """
    :param env: a VecEnv without wrappers
    :return: its environments, as far as they are objects of this process
    """
    if isinstance(env, DummyVecEnv):
        return [lane.unwrapped for lane in env.envs]
    # An adapter of another library may say what it runs
    return [getattr(env, "unwrapped", env)]


def check_evaluation_envs(callback: BaseCallback) -> None:
    """
    :param callback: the callback of a training
    :raises ValueError: if a ``BackgroundEvalCallback`` would play in an env of another callback at the same time
    """
    evaluations = [each for each in list_callbacks(callback) if isinstance(each, EvalCallback)]
    for one, other in combinations(evaluations, 2):
        is_in_background = isinstance(one, BackgroundEvalCallback) or isinstance(other, BackgroundEvalCallback)
        if is_in_background and share_envs(one.eval_env, other.eval_env):
            raise ValueError(
                "Two evaluation callbacks have the same evaluation env, and one of them plays while the training goes "
                "on (BackgroundEvalCallback): give each an env of its own."
            )


def stop_evaluations(callback: BaseCallback) -> None:
    """
    Abandon the evaluations of a training that has ended. After one that has not failed, there are none.

    :param callback: the callback of the training
    """
    for each in list_callbacks(callback):
        if isinstance(each, BackgroundEvalCallback):
            each.stop(EVALUATION_END_TIMEOUT)
