"""Search space of the value-based methods for ``sb3-async1step train -optimize``."""

from typing import TYPE_CHECKING, Any

from sb3_async1step.common.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    import optuna

# The RL Zoo's names for these architectures
NET_ARCHS = {"small": [64, 64], "medium": [256, 256], "big": [400, 300]}


def sample_hyperparams(trial: "optuna.Trial") -> dict[str, Any]:
    """
    :param trial: the Optuna trial
    :return: the sampled values
    """
    return {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 0.01, log=True),
        "update_interval": trial.suggest_int("update_interval", 1, 16, log=True),
        "target_update_interval": trial.suggest_int("target_update_interval", 100, 20_000, log=True),
        "exploration_fraction": trial.suggest_float("exploration_fraction", 0.02, 0.8),
        "exploration_final_eps": trial.suggest_float("exploration_final_eps", 0.01, 0.2),
        "max_grad_norm": trial.suggest_float("max_grad_norm", 0.3, 40.0, log=True),
        "loss": trial.suggest_categorical("loss", ["mse", "huber"]),
        "optimizer": trial.suggest_categorical("optimizer", list(OPTIMIZERS)),
        "net_arch": trial.suggest_categorical("net_arch", list(NET_ARCHS)),
        "layer_norm": trial.suggest_categorical("layer_norm", [False, True]),
    }


def convert_hyperparams(sampled: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled: the values of a trial
    :return: hyperparameters as in the YAML files; the learning rate is annealed to zero, as in the paper (section 8 of
        its supplement)
    """
    hyperparams = dict(sampled)
    hyperparams["gamma"] = 1 - hyperparams.pop("one_minus_gamma")
    hyperparams["learning_rate"] = f"lin_{hyperparams['learning_rate']}"
    hyperparams["policy_kwargs"] = {
        "net_arch": NET_ARCHS[hyperparams.pop("net_arch")],
        "layer_norm": hyperparams.pop("layer_norm"),
        "optimizer_class": OPTIMIZERS[hyperparams.pop("optimizer")],
    }
    return hyperparams
