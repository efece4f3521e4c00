"""Search space of A3C for ``sb3-async1step train -optimize``: much like that of the RL Zoo for A2C."""

from typing import TYPE_CHECKING, Any

from torch import nn

from sb3_async1step.common.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    import optuna

# The RL Zoo's names for these architectures
NET_ARCHS = {"tiny": [64], "small": [64, 64], "medium": [256, 256]}
ACTIVATION_FNS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


def sample_hyperparams(trial: "optuna.Trial") -> dict[str, Any]:
    """
    :param trial: the Optuna trial
    :return: the sampled values
    """
    return {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True),
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.0001, 0.1, log=True),
        "update_interval": trial.suggest_int("update_interval", 4, 256, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 0.01, log=True),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
        "vf_coef": trial.suggest_float("vf_coef", 0.1, 1.0),
        "normalize_advantage": trial.suggest_categorical("normalize_advantage", [False, True]),
        "max_grad_norm": trial.suggest_float("max_grad_norm", 0.3, 40.0, log=True),
        "optimizer": trial.suggest_categorical("optimizer", list(OPTIMIZERS)),
        # Of SharedRMSprop
        "rms_prop_eps": trial.suggest_float("rms_prop_eps", 1e-5, 0.1, log=True),
        "net_arch": trial.suggest_categorical("net_arch", list(NET_ARCHS)),
        "activation_fn": trial.suggest_categorical("activation_fn", list(ACTIVATION_FNS)),
    }


def convert_hyperparams(sampled: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled: the values of a trial
    :return: hyperparameters as in the YAML files; the learning rate is annealed to zero, as in the paper (section 8 of
        its supplement)
    """
    hyperparams = dict(sampled)
    hyperparams["gamma"] = 1 - hyperparams.pop("one_minus_gamma")
    hyperparams["gae_lambda"] = 1 - hyperparams.pop("one_minus_gae_lambda")
    hyperparams["learning_rate"] = f"lin_{hyperparams['learning_rate']}"
    hyperparams["policy_kwargs"] = {
        "net_arch": NET_ARCHS[hyperparams.pop("net_arch")],
        "activation_fn": ACTIVATION_FNS[hyperparams.pop("activation_fn")],
        "optimizer_class": OPTIMIZERS[hyperparams.pop("optimizer")],
    }
    return hyperparams
