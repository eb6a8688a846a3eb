"""Episodic A2C with a memory: LSTM policies, trained on whole episodes."""

from typing import ClassVar

import numpy as np
import torch as th
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy, RecurrentMultiInputActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from sb3_contrib.ppo_recurrent.policies import CnnLstmPolicy
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_episodic_a2c.actors import check_finite
from sb3_episodic_a2c.episodic_a2c import EpisodicA2C
from sb3_episodic_a2c.type_aliases import EpisodicRolloutBufferSamples


class _IntegerFeatures(ActorCriticPolicy):
    """SB3 counts the features of MultiDiscrete observations in NumPy's integers, which torch's LSTM does not take."""

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        features_extractor = super().make_features_extractor()
        features_extractor._features_dim = int(features_extractor._features_dim)
        return features_extractor


class MlpLstmPolicy(_IntegerFeatures, RecurrentActorCriticPolicy):
    """sb3-contrib's, for MultiDiscrete observations too."""


class MultiInputLstmPolicy(_IntegerFeatures, RecurrentMultiInputActorCriticPolicy):
    """sb3-contrib's, for MultiDiscrete observations too."""


class RecurrentEpisodicA2C(EpisodicA2C):
    """
    Episodic A2C with LSTM policies (Hochreiter & Schmidhuber, 1997), for environments whose observations do not tell all.

    An update takes whole episodes, and an episode starts with an empty memory. So the LSTM runs over each from a zero
    state and gradients reach back to its first step: no hidden states are stored. Episodes of unequal length are run
    side by side without padding. (While collecting with ``"carry"``, an episode that runs on across an update goes on
    from the state that the LSTM had before it.)

    Where it differs from :class:`EpisodicA2C`: sb3-contrib's recurrent policies, whose ``lstm_hidden_size``,
    ``n_lstm_layers``, ``enable_critic_lstm``, ``shared_lstm`` and ``lstm_kwargs`` belong in ``policy_kwargs``; ``predict``
    takes and returns states; ``batch_size`` cuts between episodes only, and one longer than that is a pass of its own.
    Where it differs from RecurrentPPO: backpropagation through time is not cut at ``n_steps``.

    The arguments are those of :class:`EpisodicA2C`, with the policies ``"MlpLstmPolicy"``, ``"CnnLstmPolicy"``,
    ``"MultiInputLstmPolicy"``, or a subclass of sb3-contrib's ``RecurrentActorCriticPolicy``.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpLstmPolicy": MlpLstmPolicy,
        "CnnLstmPolicy": CnnLstmPolicy,
        "MultiInputLstmPolicy": MultiInputLstmPolicy,
    }
    policy: RecurrentActorCriticPolicy
    _trains_on_whole_episodes: ClassVar[bool] = True

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, RecurrentActorCriticPolicy):
            raise ValueError(
                f"`policy` {self.policy_class.__name__} has no LSTM: use one of {sorted(self.policy_aliases)}, or a "
                "subclass of sb3_contrib.common.recurrent.policies.RecurrentActorCriticPolicy."
            )
        super()._setup_model()
        self._lstm_states: RNNStates | None = None
        """Of the running episodes, after their last step; ``(n_layers, n_envs, hidden_size)`` each."""

    def _excluded_save_params(self) -> list[str]:
        # They belong to episodes in flight, which are not saved either
        return [*super()._excluded_save_params(), "_lstm_states"]

    def _in_flight_params(self) -> list[str]:
        return [*super()._in_flight_params(), "_lstm_states"]

    def _start_rollout(self, env: VecEnv) -> None:
        lstm = self.policy.lstm_actor
        shape = (lstm.num_layers, env.num_envs, lstm.hidden_size)
        # The second time after the policy was replaced by another one
        if self._lstm_states is None or self._lstm_states.pi[0].shape != shape:
            # One tensor would do for all of them, were they not zeroed in place
            zeros = [th.zeros(shape, device=self.device) for _ in range(4)]
            self._lstm_states = RNNStates(pi=(zeros[0], zeros[1]), vf=(zeros[2], zeros[3]))

    def _sample_actions(
        self, observations: np.ndarray | dict[str, np.ndarray], policy_inputs: dict[str, np.ndarray]
    ) -> np.ndarray:
        policy = self.policy
        assert self._lstm_states is not None and self._last_episode_starts is not None
        with th.inference_mode():
            states_pi, states_vf = self._lstm_states
            if self._last_episode_starts.any():
                is_start = th.as_tensor(self._last_episode_starts, dtype=th.bool, device=self.device).view(1, -1, 1)
                for state in (*states_pi, *states_vf):
                    state.masked_fill_(is_start, 0.0)

            features_pi, features_vf = _extract_features(policy, obs_as_tensor(observations, self.device))
            latent_pi, states_pi = policy.lstm_actor(features_pi.unsqueeze(0), states_pi)
            if policy.lstm_critic is None:
                # What a critic that shares the actor's LSTM goes on from; one without any ignores it
                states_vf = states_pi
            elif self.handle_timeout_termination:
                # The only thing that the critic's state is needed for: training recomputes the values
                _, states_vf = policy.lstm_critic(features_vf.unsqueeze(0), states_vf)
            self._lstm_states = RNNStates(pi=states_pi, vf=states_vf)

            distribution = policy._get_action_dist_from_latent(policy.mlp_extractor.forward_actor(latent_pi.squeeze(0)))
            actions = distribution.get_actions().reshape(-1, *self.action_space.shape)  # type: ignore[misc]  # never None here
        return check_finite(actions.cpu().numpy())

    def _predict_terminal_values(
        self, observations: np.ndarray | dict[str, np.ndarray], env_indices: np.ndarray
    ) -> np.ndarray:
        assert self._lstm_states is not None
        with th.inference_mode():
            indices = th.as_tensor(env_indices, device=self.device)
            # Not yet zeroed for the episode that follows: that happens when its first action is sampled
            hidden, cell = (state[:, indices] for state in self._lstm_states.vf)
            values = self.policy.predict_values(
                obs_as_tensor(observations, self.device),  # type: ignore[arg-type]  # sb3-contrib forgets dicts
                (hidden, cell),
                episode_starts=th.zeros(len(env_indices), device=self.device),
            )
        return values.flatten().cpu().numpy()

    def _evaluate_actions(self, samples: EpisodicRolloutBufferSamples) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        policy = self.policy
        # 1. From one episode behind the other to one step of all running episodes behind the other
        positions, pieces = _interleave(np.array(samples.episode_lengths))
        to_steps = th.as_tensor(np.argsort(positions), device=self.device)
        to_episodes = th.as_tensor(positions, device=self.device)
        observations = (
            {key: observation[to_steps] for key, observation in samples.observations.items()}
            if isinstance(samples.observations, dict)
            else samples.observations[to_steps]
        )

        # 2. The LSTMs alone see time, all else works on flat tensors
        features_pi, features_vf = _extract_features(policy, observations)
        latent_pi = _run_lstm(policy.lstm_actor, features_pi, pieces)
        if policy.lstm_critic is not None:
            latent_vf = _run_lstm(policy.lstm_critic, features_vf, pieces)
        elif policy.shared_lstm:
            # Only the actor trains it
            latent_vf = latent_pi.detach()
        else:
            latent_vf = policy.critic(features_vf)  # type: ignore[misc]  # first set to None, so inferred as None
        values = policy.value_net(policy.mlp_extractor.forward_critic(latent_vf)).flatten()
        distribution = policy._get_action_dist_from_latent(policy.mlp_extractor.forward_actor(latent_pi))
        log_prob = distribution.log_prob(samples.actions[to_steps])
        entropy = distribution.entropy()

        # 3. And back
        return values[to_episodes], log_prob[to_episodes], None if entropy is None else entropy[to_episodes]


def _extract_features(
    policy: RecurrentActorCriticPolicy, observations: th.Tensor | dict[str, th.Tensor]
) -> tuple[th.Tensor, th.Tensor]:
    """Features for the actor and for the critic, ``(n, features_dim)`` each, computed once where they are the same."""
    features = policy.extract_features(observations)
    return features if isinstance(features, tuple) else (features, features)


def _interleave(episode_lengths: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """
    Order the transitions of episodes by time step, so that an LSTM can run over all of them at once without padding.

    Within a step the longest episode comes first. So the episodes still running at a step are the first ones of the step
    before, and between two lengths that occur their number stays the same: that stretch is a dense
    ``(n_steps, n_running, ...)`` piece of the reordered array.

    :param episode_lengths: ``(n_episodes,)`` lengths >= 1 of episodes that lie one behind the other
    :return: ``(n_transitions,)`` new position of every transition, and ``(n_steps, n_running)`` of the pieces in order
    """
    lengths = np.unique(episode_lengths)
    n_running = len(episode_lengths) - np.searchsorted(np.sort(episode_lengths), lengths)
    n_steps = np.diff(lengths, prepend=0)

    # Of each time step
    step_sizes = np.repeat(n_running, n_steps)
    first_positions = np.cumsum(step_sizes) - step_sizes
    # Of each transition
    ranks = np.empty(len(episode_lengths), dtype=np.int64)
    ranks[np.argsort(-episode_lengths, kind="stable")] = np.arange(len(episode_lengths))
    starts = np.cumsum(episode_lengths) - episode_lengths
    steps = np.arange(episode_lengths.sum()) - np.repeat(starts, episode_lengths)
    positions = first_positions[steps] + np.repeat(ranks, episode_lengths)
    return positions, list(zip(n_steps.tolist(), n_running.tolist(), strict=True))


def _run_lstm(lstm: nn.LSTM, features: th.Tensor, pieces: list[tuple[int, int]]) -> th.Tensor:
    """
    Run an LSTM over whole episodes, from a zero state.

    Dense pieces without padding: on a CPU an order of magnitude faster than PyTorch's ``PackedSequence`` where lengths
    differ, and memory grows with the number of transitions, however unequal the episodes are.

    :param lstm: The LSTM
    :param features: ``(n_transitions, features_dim)``, ordered by :func:`_interleave`
    :param pieces: ``(n_steps, n_running)`` each
    :return: ``(n_transitions, hidden_size)`` in the same order
    """
    outputs = []
    states: tuple[th.Tensor, th.Tensor] | None = None
    for piece, (n_steps, n_running) in zip(
        features.split([n_steps * n_running for n_steps, n_running in pieces]), pieces, strict=True
    ):
        if states is not None:
            # The shortest episodes ended with the piece before
            states = (states[0][:, :n_running].contiguous(), states[1][:, :n_running].contiguous())
        output, states = lstm(piece.reshape(n_steps, n_running, -1), states)
        outputs.append(output.flatten(end_dim=1))
    return th.cat(outputs)
