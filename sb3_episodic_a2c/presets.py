"""
Named settings of the constructor's arguments.

The package grew from a TensorFlow notebook. :func:`notebook_preset` is that notebook, line by line:

==================================================================  =======================================================
notebook                                                            here
==================================================================  =======================================================
``layers.Dense(128, activation="relu")``, shared by both heads      ``policy="SharedMlpPolicy"``, initialised as by Keras
``tf.keras.optimizers.Adam(learning_rate=0.01)``                    ``learning_rate=0.01``, Adam with Keras' ``eps=1e-7``
``run_episode``: one environment until ``done``, then one update    ``n_episodes=1``, one environment
``get_expected_return(rewards, gamma=0.99)``                        ``gamma=0.99``
``(returns - mean) / (std + eps)``, each episode by its own         ``standardize_returns="episode"``
a time limit ends the episode like a failure                        ``handle_timeout_termination=False``
``advantage = returns - values``, without stopping the gradient     ``detach_advantage=False``
``-sum(action_log_probs * advantage)``                              the policy loss
``tf.keras.losses.Huber(reduction="sum")``                          ``huber_delta=1.0``, ``vf_coef=1.0``
one gradient step on Monte Carlo returns an episode                 ``gae_lambda=1.0``, ``n_value_epochs=0``
no entropy bonus, no clipping                                       ``ent_coef=0.0``, ``max_grad_norm=None``
``tqdm`` over episodes, ``episode_reward``, ``running_reward``      ``EpisodeProgressCallback()``
stop when the mean of 100 episodes is above 475                     ``StopTrainingOnSolved()``
GIF of the agent                                                    ``python -m sb3_episodic_a2c gif``
==================================================================  =======================================================

Returns, losses, gradients, and parameters after 1 and 5 updates agree with numbers that the TensorFlow code computed
(``tests/test_notebook.py``). One difference remains: Keras adds Adam's epsilon before the bias correction, torch after it. It
shows in the few parameters whose gradient is about as small as epsilon.
"""

from typing import Any


def notebook_preset() -> dict[str, Any]:
    """
    The setting of the notebook: ``EpisodicA2C(env=env, **notebook_preset())``, or on the command line
    ``python -m sb3_episodic_a2c solve --env CartPole-v1 --preset notebook``.

    Use one environment: every update is one episode.

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
        "gae_lambda": 1.0,
        "n_value_epochs": 0,
        "ent_coef": 0.0,
        "vf_coef": 1.0,
        "max_grad_norm": None,
        # Keras' epsilon of Adam
        "policy_kwargs": {"optimizer_kwargs": {"eps": 1e-7}},
    }
