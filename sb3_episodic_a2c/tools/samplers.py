"""
What a search of RL Zoo (``train -optimize``) tries for our algorithms: the ranges, and how a trial becomes an agent.

The networks have an actor and a critic of their own, so a search does not fit ``"SharedMlpPolicy"``.
"""

from typing import TYPE_CHECKING, Any

from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from sb3_episodic_a2c.actors import INDEPENDENT
from sb3_episodic_a2c.returns import STANDARDIZATIONS
from sb3_episodic_a2c.selection import PARTIAL_EPISODES

if TYPE_CHECKING:
    import optuna

NET_ARCHS: dict[str, list[int]] = {"tiny": [64], "small": [64, 64], "medium": [128, 128], "big": [256, 256]}

ACTIVATION_FNS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


def sample_params(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sample hyperparameters of :class:`EpisodicA2C` or :class:`MaskableEpisodicA2C`.

    The number of environments and their wrappers are not searched: the Zoo takes them from the config, or from
    ``-params n_envs:8 normalize:...``. Nor is ``noise_resample_prob``, which policies for images refuse: the Zoo does not say
    here what the policy is.

    :param trial: Where they are drawn from
    :param n_actions: Dimension of a Box action space, 0 for any other
    :param n_envs: Number of environments
    :param additional_args: For off-policy algorithms; ignored
    :return: Arguments of the constructor
    """
    return _arguments(_suggest(trial, n_actions, n_envs))


def sample_lstm_params(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """Sample hyperparameters of :class:`RecurrentEpisodicA2C`, see :func:`sample_params`."""
    sampled_params = {
        **_suggest(trial, n_actions, n_envs),
        "lstm_hidden_size": trial.suggest_categorical("lstm_hidden_size", [16, 32, 64, 128, 256]),
        "enable_critic_lstm": trial.suggest_categorical("enable_critic_lstm", [False, True]),
    }
    return _arguments(sampled_params)


def _suggest(trial: "optuna.Trial", n_actions: int, n_envs: int) -> dict[str, Any]:
    sampled_params: dict[str, Any] = {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-4, 0.1, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 2e-2, log=True),
        "lr_schedule": trial.suggest_categorical("lr_schedule", ["constant", "linear"]),
        # 1, 2, 4 or 8
        "n_episodes_pow": trial.suggest_int("n_episodes_pow", 0, 3),
        "standardize_returns": trial.suggest_categorical("standardize_returns", list(STANDARDIZATIONS)),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
        "vf_coef": trial.suggest_float("vf_coef", 0.1, 2.0, log=True),
        "huber_delta": trial.suggest_categorical("huber_delta", [0.3, 1.0, 10.0]),
        # The gradient is a sum over all transitions, so the values are larger than A2C's. If every update is clipped, Adam
        # gives all the same weight, however long their episodes
        "max_grad_norm": trial.suggest_categorical("max_grad_norm", [None, 1.0, 10.0, 100.0]),
        "net_arch": trial.suggest_categorical("net_arch", list(NET_ARCHS)),
        "activation_fn": trial.suggest_categorical("activation_fn", list(ACTIVATION_FNS)),
        "gae_lambda": trial.suggest_categorical("gae_lambda", [0.9, 0.95, 0.98, 1.0]),
        "n_value_epochs": trial.suggest_categorical("n_value_epochs", [0, 4, 10]),
        "value_learning_rate": trial.suggest_float("value_learning_rate", 1e-4, 1e-2, log=True),
    }
    if n_envs > 1:
        sampled_params["partial_episodes"] = trial.suggest_categorical("partial_episodes", list(PARTIAL_EPISODES))
    if n_actions > 0:
        sampled_params["use_sde"] = trial.suggest_categorical("use_sde", [False, True])
        sampled_params["sde_sample_freq"] = trial.suggest_categorical("sde_sample_freq", [-1, 4, 8, 16, 64])
        sampled_params["log_std_init"] = trial.suggest_float("log_std_init", -2.0, 1.0)
    # The Zoo displays these instead of the transformed values
    trial.set_user_attr("gamma", 1 - sampled_params["one_minus_gamma"])
    trial.set_user_attr("n_episodes", 2 ** sampled_params["n_episodes_pow"])
    return sampled_params


def convert_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: What a trial stores
    :return: Hyperparameters as they stand in a config: arguments of the constructor, except for the learning rate, where the
        Zoo turns ``"lin_0.003"`` into a schedule
    """
    params = dict(sampled_params)
    if params.pop("lr_schedule") == "linear":
        params["learning_rate"] = f"lin_{params['learning_rate']}"
    params["gamma"] = 1 - params.pop("one_minus_gamma")
    params["n_episodes"] = 2 ** params.pop("n_episodes_pow")
    # What does not fit the rest is overwritten, not left out: the environment's entry may have it
    has_units = STANDARDIZATIONS[params["standardize_returns"]].has_units
    # A value at a time limit, and one in an advantage, needs a critic that has units
    params["handle_timeout_termination"] = has_units
    # Studies of older versions have none
    params.setdefault("n_value_epochs", 0)
    params.setdefault("gae_lambda", 1.0)
    if not has_units:
        params["gae_lambda"] = 1.0
    if params["n_value_epochs"] == 0:
        params["value_learning_rate"] = None
    if params.get("use_sde"):
        params["noise_resample_prob"] = INDEPENDENT
    net_arch = NET_ARCHS[params.pop("net_arch")]
    policy_kwargs = {
        "net_arch": {"pi": list(net_arch), "vf": list(net_arch)},
        "activation_fn": ACTIVATION_FNS[params.pop("activation_fn")],
    }
    for name in ("log_std_init", "lstm_hidden_size", "enable_critic_lstm"):
        if name in params:
            policy_kwargs[name] = params.pop(name)
    return {**params, "policy_kwargs": policy_kwargs}


def _arguments(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the constructor. In a search the Zoo makes no schedules, so they are made here."""
    arguments = convert_params(sampled_params)
    if sampled_params["lr_schedule"] == "linear":
        arguments["learning_rate"] = LinearSchedule(sampled_params["learning_rate"], 0.0, 1.0)
    return arguments
