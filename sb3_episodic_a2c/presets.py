"""Named settings of the constructor's arguments."""

from typing import Any


def notebook_preset() -> dict[str, Any]:
    """
    The setting of the TensorFlow notebook that this package grew from: ``EpisodicA2C(env=env, **notebook_preset())``.

    One environment is part of it: every update is one episode.

    :return: A fresh dict of arguments of :class:`EpisodicA2C`, the policy among them
    """
    return {
        "policy": "SharedMlpPolicy",
        "learning_rate": 0.01,
        "n_episodes": 1,
        "gamma": 0.99,
        "standardize_returns": "episode",
        "handle_timeout_termination": False,
        "huber_delta": 1.0,
        "detach_advantage": False,
        "ent_coef": 0.0,
        "vf_coef": 1.0,
        "max_grad_norm": None,
        # Keras' epsilon of Adam
        "policy_kwargs": {"optimizer_kwargs": {"eps": 1e-7}},
    }
