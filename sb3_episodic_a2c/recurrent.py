"""Episodic A2C with LSTM policies, trained on whole episodes."""

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

from sb3_episodic_a2c.actors import check_finite, refusing_too_large
from sb3_episodic_a2c.buffers import RunningEpisodes
from sb3_episodic_a2c.episodic_a2c import EpisodicA2C
from sb3_episodic_a2c.evaluation import Evaluations
from sb3_episodic_a2c.plain_mlp import BYPASSED, is_compiled, overridden_methods, unwrapped
from sb3_episodic_a2c.samples import EpisodicRolloutBufferSamples

UNSUPPORTED_LSTM_KWARGS = ("batch_first", "bidirectional", "proj_size")
"""Arguments of ``nn.LSTM`` that change the shapes of its inputs, outputs or states, which sb3-contrib's policies rely on."""


class _IntegerFeatures(ActorCriticPolicy):
    """Gives torch's LSTM Python integers: SB3 counts the features of MultiDiscrete observations in NumPy's."""

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        features_extractor = super().make_features_extractor()
        features_extractor._features_dim = int(features_extractor._features_dim)
        return features_extractor


class MlpLstmPolicy(_IntegerFeatures, RecurrentActorCriticPolicy):
    """sb3-contrib's policy, which here also accepts MultiDiscrete observations."""


class MultiInputLstmPolicy(_IntegerFeatures, RecurrentMultiInputActorCriticPolicy):
    """sb3-contrib's policy, which here also accepts MultiDiscrete observations."""


class RecurrentEpisodicA2C(EpisodicA2C):
    """
    Episodic A2C with LSTM policies (Hochreiter & Schmidhuber, 1997), for environments that are only partially observable.

    An update takes whole episodes, and an episode starts with an empty memory. So the LSTM runs over each episode from a zero
    state, gradients reach back to its first step, and no hidden states are stored. Episodes of unequal length are run side by
    side without padding.

    With ``partial_episodes="carry"``, an episode that outlasts an update goes on from the state that the new parameters give
    it, which is what training will compute: its steps so far are run through the LSTM again at every such update. The cost
    grows with the square of an episode that is much longer than the others. With ``"discard"`` nothing is run again.

    Where it differs from :class:`EpisodicA2C`: sb3-contrib's recurrent policies, whose ``lstm_hidden_size``,
    ``n_lstm_layers``, ``enable_critic_lstm``, ``shared_lstm`` and ``lstm_kwargs`` belong in ``policy_kwargs``; ``predict``
    takes and returns states; ``batch_size`` cuts between episodes only, and one longer than that is a pass of its own.
    ``EpisodicA2C`` refuses these policies, because it would train them without a memory. Where it differs from RecurrentPPO:
    backpropagation through time is not cut at ``n_steps``.

    The arguments are those of :class:`EpisodicA2C`, with the policies ``"MlpLstmPolicy"``, ``"CnnLstmPolicy"``,
    ``"MultiInputLstmPolicy"``, or a subclass of sb3-contrib's ``RecurrentActorCriticPolicy``. A subclass may have other
    layers. It is refused if it overrides ``forward``, ``get_distribution``, ``predict_values``, ``evaluate_actions`` or
    ``_process_sequence``, which would not be called. ``lstm_kwargs`` that change shapes are refused as well (``batch_first``,
    ``bidirectional``, ``proj_size``).
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpLstmPolicy": MlpLstmPolicy,
        "CnnLstmPolicy": CnnLstmPolicy,
        "MultiInputLstmPolicy": MultiInputLstmPolicy,
    }
    policy: RecurrentActorCriticPolicy
    _policy_base_class: ClassVar[type[BasePolicy]] = RecurrentActorCriticPolicy
    _trains_on_whole_episodes: ClassVar[bool] = True

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, RecurrentActorCriticPolicy):
            raise ValueError(
                f"`policy` {self.policy_class.__name__} has no LSTM: use one of {sorted(self.policy_aliases)}, or a "
                "subclass of sb3_contrib.common.recurrent.policies.RecurrentActorCriticPolicy."
            )
        _refuse_overridden(self.policy_class)
        lstm_kwargs = self.policy_kwargs.get("lstm_kwargs") or {}
        for name in UNSUPPORTED_LSTM_KWARGS:
            if lstm_kwargs.get(name):
                raise ValueError(
                    f"`lstm_kwargs` of `policy_kwargs` has {name}={lstm_kwargs[name]!r}, which changes shapes that the "
                    f"policy relies on: leave {name} out."
                )
        super()._setup_model()
        self._lstm_states: RNNStates | None = None
        """States of the running episodes after their last step, ``(n_layers, n_envs, hidden_size)`` each."""

    def _excluded_save_params(self) -> list[str]:
        # They belong to running episodes, which are not saved
        return [*super()._excluded_save_params(), "_lstm_states"]

    def _start_rollout(self, env: VecEnv) -> None:
        # The policy may have been replaced since
        _refuse_overridden(unwrapped(self.policy))
        lstm = self.policy.lstm_actor
        with th.no_grad():
            # Four tensors, as each is zeroed in place
            zeros = [th.zeros(lstm.num_layers, env.num_envs, lstm.hidden_size, device=self.device) for _ in range(4)]
            self._lstm_states = RNNStates(pi=(zeros[0], zeros[1]), vf=(zeros[2], zeros[3]))
            for running in self.rollout_buffer.get_running(self.batch_size):
                self._recall(running)

    def _recall(self, running: RunningEpisodes) -> None:
        """
        Run the LSTMs over the running episodes so far: the parameters may have changed since their actions were sampled.

        :param running: The steps so far of the running episodes, or of some of them
        """
        policy = self.policy
        assert self._lstm_states is not None
        positions, pieces = _interleave(running.episode_lengths)
        features_pi, features_vf = _extract_features(policy, _take(running.observations, self._by_step(positions)))
        runs = [(policy.lstm_actor, features_pi, self._lstm_states.pi)]
        if policy.lstm_critic is not None and self.handle_timeout_termination:
            runs.append((policy.lstm_critic, features_vf, self._lstm_states.vf))

        # All episodes run at the first step, and keep the place that they have there
        places = positions[np.cumsum(running.episode_lengths) - running.episode_lengths]
        for lstm, features, states in runs:
            _, last_states = _run_lstm(lstm, features, pieces)
            for state, last_state in zip(states, last_states, strict=True):
                state[:, running.env_indices] = last_state[:, places]

    def _sample_actions(
        self, observations: np.ndarray | dict[str, np.ndarray], policy_inputs: dict[str, np.ndarray]
    ) -> np.ndarray:
        policy = self.policy
        assert self._lstm_states is not None and self._last_episode_starts is not None
        with th.no_grad(), refusing_too_large():
            states_pi, states_vf = self._lstm_states
            if self._last_episode_starts.any():
                is_start = th.as_tensor(self._last_episode_starts, dtype=th.bool, device=self.device).view(1, -1, 1)
                for state in (*states_pi, *states_vf):
                    state.masked_fill_(is_start, 0.0)

            tensor = obs_as_tensor(observations, self.device)
            if is_compiled(policy):
                # No episode starts: the states are zeroed already
                starts = th.zeros(len(self._last_episode_starts), device=self.device)
                actions, _, _, self._lstm_states = policy(tensor, self._lstm_states, starts)
                return check_finite(actions.reshape(-1, *self.action_space.shape).cpu().numpy())  # type: ignore[misc]  # not None
            features_pi, features_vf = _extract_features(policy, tensor)
            latent_pi, states_pi = policy.lstm_actor(features_pi.unsqueeze(0), states_pi)
            if policy.lstm_critic is None:
                # A critic that shares the actor's LSTM goes on from its state; one without an LSTM ignores it
                states_vf = states_pi
            elif self.handle_timeout_termination:
                # Only values at time limits need the critic's state: training recomputes all values
                _, states_vf = policy.lstm_critic(features_vf.unsqueeze(0), states_vf)
            self._lstm_states = RNNStates(pi=states_pi, vf=states_vf)

            distribution = policy._get_action_dist_from_latent(policy.mlp_extractor.forward_actor(latent_pi.squeeze(0)))
            actions = distribution.get_actions().reshape(-1, *self.action_space.shape)  # type: ignore[misc]  # never None here
        return check_finite(actions.cpu().numpy())

    def _predict_terminal_values(
        self, observations: np.ndarray | dict[str, np.ndarray], env_indices: np.ndarray
    ) -> np.ndarray:
        assert self._lstm_states is not None
        with th.no_grad():
            indices = th.as_tensor(env_indices, device=self.device)
            # Still the states of the finished episodes: they are zeroed when the next action is sampled
            hidden, cell = (state[:, indices] for state in self._lstm_states.vf)
            values = self.policy.predict_values(
                obs_as_tensor(observations, self.device),  # type: ignore[arg-type]  # sb3-contrib forgets dicts
                (hidden, cell),
                episode_starts=th.zeros(len(env_indices), device=self.device),
            )
        return values.flatten().cpu().numpy()

    def _evaluate_actions(self, samples: EpisodicRolloutBufferSamples) -> Evaluations:
        policy = self.policy
        # 1. From episodes concatenated to time steps concatenated, each with one transition of every running episode
        positions, pieces = _interleave(np.array(samples.episode_lengths))
        to_steps, to_episodes = self._by_step(positions), th.as_tensor(positions, device=self.device)

        # 2. Only the LSTMs depend on time. Everything else works on flat tensors
        features_pi, features_vf = _extract_features(policy, _take(samples.observations, to_steps))
        latent_pi, _ = _run_lstm(policy.lstm_actor, features_pi, pieces)
        values = self._values(features_vf, pieces, latent_pi)
        distribution = policy._get_action_dist_from_latent(policy.mlp_extractor.forward_actor(latent_pi))
        log_prob = distribution.log_prob(samples.actions[to_steps])
        entropy = distribution.entropy()

        # 3. Back to episodes concatenated
        return values[to_episodes], log_prob[to_episodes], None if entropy is None else entropy[to_episodes]

    def _by_step(self, positions: np.ndarray) -> th.Tensor:
        """Which transitions, of episodes concatenated, to take for time steps concatenated."""
        return th.as_tensor(np.argsort(positions), device=self.device)

    def _values(self, features_vf: th.Tensor, pieces: list[tuple[int, int]], latent_pi: th.Tensor | None) -> th.Tensor:
        """``(n,)``, from the critic's features ``(n, features_dim)`` and, if it shares it, the actor's latent."""
        policy = self.policy
        if policy.lstm_critic is not None:
            latent_vf, _ = _run_lstm(policy.lstm_critic, features_vf, pieces)
        elif policy.shared_lstm:
            assert latent_pi is not None
            # Only the actor trains it
            latent_vf = latent_pi.detach()
        else:
            latent_vf = policy.critic(features_vf)  # type: ignore[misc]  # first set to None, so inferred as None
        return policy.value_net(policy.mlp_extractor.forward_critic(latent_vf)).flatten()

    def _evaluate_values(self, samples: EpisodicRolloutBufferSamples) -> th.Tensor:
        policy = self.policy
        positions, pieces = _interleave(np.array(samples.episode_lengths))
        observations = _take(samples.observations, self._by_step(positions))
        latent_pi = None
        if policy.shared_lstm:
            features_pi, features_vf = _extract_features(policy, observations)
            with th.no_grad():
                latent_pi, _ = _run_lstm(policy.lstm_actor, features_pi, pieces)
        else:
            features_vf = _extract_critic_features(policy, observations)
        return self._values(features_vf, pieces, latent_pi)[th.as_tensor(positions, device=self.device)]


def _refuse_overridden(policy: RecurrentActorCriticPolicy | type[BasePolicy]) -> None:
    """
    Refuse overridden methods, which would silently not be called.

    :param policy: A policy, or its class
    :raises ValueError: It names them and the remedy
    """
    overridden = overridden_methods(policy, RecurrentActorCriticPolicy, BYPASSED["sequences"])
    if overridden:
        name = (policy if isinstance(policy, type) else type(policy)).__name__
        raise ValueError(
            f"`policy` {name} overrides {', '.join(overridden)}, which would not be called: whole episodes are run through "
            "`extract_features`, `lstm_actor`, `lstm_critic`, `critic`, `mlp_extractor`, `_get_action_dist_from_latent` and "
            "`value_net`. Change one of these instead."
        )


def _take(observations: th.Tensor | dict[str, th.Tensor], indices: th.Tensor) -> th.Tensor | dict[str, th.Tensor]:
    if isinstance(observations, dict):
        return {key: observation[indices] for key, observation in observations.items()}
    return observations[indices]


def _extract_features(
    policy: RecurrentActorCriticPolicy, observations: th.Tensor | dict[str, th.Tensor]
) -> tuple[th.Tensor, th.Tensor]:
    """Features for the actor and for the critic, ``(n, features_dim)`` each, computed once where they are the same."""
    features = policy.extract_features(observations)
    return features if isinstance(features, tuple) else (features, features)


def _extract_critic_features(policy: RecurrentActorCriticPolicy, observations: th.Tensor | dict[str, th.Tensor]) -> th.Tensor:
    """``(n, features_dim)``, without running the actor's extractor, if the policy has two."""
    if policy.share_features_extractor or overridden_methods(unwrapped(policy), ActorCriticPolicy, ["extract_features"]):
        return _extract_features(policy, observations)[1]
    return BasePolicy.extract_features(unwrapped(policy), observations, policy.vf_features_extractor)


def _interleave(episode_lengths: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """
    Order the transitions of episodes by time step, so that an LSTM can run over all of them at once without padding.

    Within a step the longest episode comes first. So the episodes still running at a step are the first ones of the step
    before, and between two lengths that occur their number stays the same: that stretch is a dense
    ``(n_steps, n_running, ...)`` piece of the reordered array.

    :param episode_lengths: ``(n_episodes,)`` lengths >= 1 of concatenated episodes
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


def _run_lstm(
    lstm: nn.LSTM, features: th.Tensor, pieces: list[tuple[int, int]]
) -> tuple[th.Tensor, tuple[th.Tensor, th.Tensor]]:
    """
    Run an LSTM over episodes from their first step, from a zero state.

    Dense pieces without padding: on a CPU an order of magnitude faster than PyTorch's ``PackedSequence`` where lengths
    differ, and memory grows with the number of transitions, however unequal the episodes are.

    :param lstm: The LSTM
    :param features: ``(n_transitions, features_dim)``, ordered by :func:`_interleave`
    :param pieces: ``(n_steps, n_running)`` each
    :return: Outputs ``(n_transitions, hidden_size)`` in the same order; hidden and cell state of each episode after its last
        step, ``(n_layers, n_episodes, hidden_size)``, in the order that the episodes have within a step
    """
    outputs, last_hidden, last_cell = [], [], []
    states: tuple[th.Tensor, th.Tensor] | None = None
    n_going_on = [*(n_running for _, n_running in pieces[1:]), 0]
    features_of_pieces = features.split([n_steps * n_running for n_steps, n_running in pieces])
    for piece, (n_steps, n_running), n_left in zip(features_of_pieces, pieces, n_going_on, strict=True):
        output, (hidden, cell) = lstm(piece.reshape(n_steps, n_running, -1), states)
        outputs.append(output.flatten(end_dim=1))
        # The shortest episodes end here
        last_hidden.append(hidden[:, n_left:])
        last_cell.append(cell[:, n_left:])
        states = (hidden[:, :n_left].contiguous(), cell[:, :n_left].contiguous())
    return th.cat(outputs), (th.cat(last_hidden[::-1], dim=1), th.cat(last_cell[::-1], dim=1))
