"""Where users extend the algorithm: another objective, another standardisation, another `train` in the transaction."""

from typing import Any

import numpy as np
import optuna
import pytest
import torch as th
from torch.nn import functional as F

from sb3_episodic_a2c import EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C
from sb3_episodic_a2c.callbacks import StopTrainingOnSolved
from sb3_episodic_a2c.guards.transaction import Transaction
from sb3_episodic_a2c.losses import Losses, policy_loss
from sb3_episodic_a2c.returns import STANDARDIZATIONS, ReturnStatistics, Standardization, update_statistics
from sb3_episodic_a2c.samples import EpisodicRolloutBufferSamples
from sb3_episodic_a2c.tools import samplers
from tests.envs import TargetEnv, vectorized


class ClippedRatio(EpisodicA2C):
    """PPO's surrogate (Schulman et al., 2017). At the first step on new episodes the ratio is 1, its gradient A2C's."""

    def _losses(
        self, samples: EpisodicRolloutBufferSamples, values: th.Tensor, log_prob: th.Tensor, entropy: th.Tensor | None
    ) -> Losses:
        losses = super()._losses(samples, values, log_prob, entropy)
        assert samples.old_log_prob is not None and samples.advantages is not None
        ratio = (log_prob - samples.old_log_prob).exp()
        clipped = ratio.clamp(0.8, 1.2)
        surrogate = th.minimum(ratio * samples.advantages, clipped * samples.advantages)
        return losses._replace(policy=-surrogate.sum())


class Auxiliary(EpisodicA2C):
    """An auxiliary term that pulls log-probabilities together."""

    def _losses(
        self, samples: EpisodicRolloutBufferSamples, values: th.Tensor, log_prob: th.Tensor, entropy: th.Tensor | None
    ) -> Losses:
        losses = super()._losses(samples, values, log_prob, entropy)
        return losses._replace(auxiliary={"spread_loss": 0.1 * (log_prob - log_prob.mean()).square().sum()})


def parameters_of(model: EpisodicA2C) -> th.Tensor:
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()


def test_the_gradient_of_a_clipped_ratio_is_that_of_a2c() -> None:
    arguments: dict[str, Any] = {"policy": "MlpPolicy", "env": "CartPole-v1", "seed": 0, "device": "cpu"}
    plain, clipped = EpisodicA2C(**arguments).learn(500), ClippedRatio(**arguments).learn(500)
    th.testing.assert_close(parameters_of(clipped), parameters_of(plain), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("algorithm", [ClippedRatio, Auxiliary])
def test_an_objective_of_ones_own_learns(algorithm: type[EpisodicA2C]) -> None:
    solved = StopTrainingOnSolved(reward_threshold=150, n_episodes=50)
    model = algorithm("MlpPolicy", "CartPole-v1", seed=0, device="cpu").learn(60_000, callback=solved)
    assert solved.solved_at is not None, solved.mean_reward
    assert ("train/spread_loss" in model.logger.name_to_value) == (algorithm is Auxiliary)


def test_an_auxiliary_term_is_trained_on() -> None:
    """Alone, it makes the policy choose all actions with the same probability."""

    class Alone(Auxiliary):
        def _losses(self, *args: Any) -> Losses:
            losses = super()._losses(*args)
            return losses._replace(policy=0 * losses.policy)

    model = Alone("MlpPolicy", "CartPole-v1", vf_coef=0.0, seed=0, device="cpu")
    model.policy.action_net.weight.data.mul_(100)
    observations = th.randn(100, 4)

    def spread() -> float:
        with th.no_grad():
            return float(model.policy.get_distribution(observations).distribution.probs.std(dim=0).mean())

    before = spread()
    model.learn(5_000)
    assert spread() < 0.5 * before


@pytest.mark.parametrize("algorithm", [EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C])
def test_every_variant_asks_the_hook(algorithm: type[EpisodicA2C]) -> None:
    seen: list[EpisodicRolloutBufferSamples] = []

    class Watched(algorithm):  # type: ignore[valid-type,misc]  # a variable
        def _losses(self, samples: EpisodicRolloutBufferSamples, *args: Any) -> Losses:
            seen.append(samples)
            losses = super()._losses(samples, *args)
            th.testing.assert_close(losses.policy, policy_loss(args[1], samples.advantages))
            return losses

        def train(self) -> None:
            super().train()
            if self.rollout_buffer.size():
                np.testing.assert_allclose(self.rollout_buffer.advantages[:, 0], seen[-1].advantages, rtol=1e-5)
                np.testing.assert_allclose(self.rollout_buffer.log_probs[:, 0], seen[-1].old_log_prob, rtol=1e-5)

    policy = "MlpLstmPolicy" if algorithm is RecurrentEpisodicA2C else "MlpPolicy"
    arguments = {"use_masking": False} if algorithm is MaskableEpisodicA2C else {}
    Watched(policy, "CartPole-v1", seed=0, device="cpu", **arguments).learn(100)
    assert seen and all(len(samples.advantages) == len(samples.returns) for samples in seen)


def _divide_by_running_std(
    returns: np.ndarray, episode_lengths: np.ndarray, statistics: ReturnStatistics
) -> tuple[np.ndarray, ReturnStatistics]:
    merged = update_statistics(statistics, returns)
    # In these units no mean is subtracted
    return returns / merged.std, ReturnStatistics(0.0, merged.variance, merged.count)


def test_another_standardisation_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STANDARDIZATIONS, "scale", Standardization(_divide_by_running_std, has_units=True, is_running=True))
    # RL Zoo's sampler offers it
    study = optuna.create_study()
    trial = study.ask()
    samplers.sample_params(trial, n_actions=2, n_envs=1, additional_args={})
    assert "scale" in trial.distributions["standardize_returns"].choices
    solved = StopTrainingOnSolved(reward_threshold=100, n_episodes=20)
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", standardize_returns="scale", seed=0, device="cpu")
    model.learn(50_000, callback=solved)
    assert solved.solved_at is not None, solved.mean_reward
    assert model.return_statistics.mean == 0.0 and model.return_statistics.std > 1.0
    with pytest.raises(ValueError, match="'scale'"):
        EpisodicA2C("MlpPolicy", "CartPole-v1", standardize_returns="scales")
    monkeypatch.setitem(STANDARDIZATIONS, "scale", Standardization(_divide_by_running_std, has_units=False))
    with pytest.raises(ValueError, match="no fixed units"):
        EpisodicA2C("MlpPolicy", "CartPole-v1", standardize_returns="scale")


def test_a_train_of_ones_own_in_the_transaction() -> None:
    class TwoSteps(EpisodicA2C):
        """Squared errors instead of Huber's, and two steps an update."""

        def train(self) -> None:
            if not self.rollout_buffer.size():
                return
            with self.update_transaction() as transaction:
                for step in range(2):
                    self.policy.optimizer.zero_grad()
                    for samples in self.rollout_buffer.get():
                        values, log_prob, _ = self._evaluate_actions(samples)
                        advantages = samples.returns - values.detach()
                        (F.mse_loss(values, samples.returns, reduction="sum") - (log_prob * advantages).sum()).backward()
                    if step == 0:
                        transaction.commit()
                    self.policy.optimizer.step()
                self._n_updates += 1

    model = TwoSteps("MlpPolicy", "CartPole-v1", seed=0, device="cpu").learn(20_000)
    assert model.return_statistics.count > 0
    assert np.mean([info["r"] for info in list(model.ep_info_buffer)[-20:]]) > 60


@pytest.mark.parametrize("commit", [False, True])
def test_a_transaction_undoes_all_of_its_changes_or_none(commit: bool) -> None:
    tensors = [th.zeros(3), th.ones(2, requires_grad=True)]
    calls: list[str] = []
    with Transaction() as transaction:
        transaction.on_undo(calls.append, "first")
        transaction.keep(tensors)
        with th.no_grad():
            for tensor in tensors:
                tensor.add_(5)
        transaction.on_undo(calls.append, "last")
        if commit:
            transaction.commit()
    offset = 5 if commit else 0
    assert tensors[0].tolist() == [offset] * 3 and tensors[1].tolist() == [1 + offset] * 2
    assert calls == ([] if commit else ["last", "first"])


def test_all_environments_share_one_update() -> None:
    """The hook sees the episodes of all environments, in passes that add up to the update."""
    sizes: list[int] = []

    class Sizes(EpisodicA2C):
        def _losses(self, samples: EpisodicRolloutBufferSamples, *args: Any) -> Losses:
            sizes.append(len(samples.returns))
            return super()._losses(samples, *args)

    model = Sizes("MlpPolicy", vectorized(lambda _: TargetEnv(), 3), batch_size=7, seed=0, device="cpu")
    model.learn(60)
    assert max(sizes) == 7 and sum(sizes) % model.rollout_buffer.size() == 0


def test_several_updates_on_one_rollout_see_the_log_probabilities_before_the_first() -> None:
    """What a clipped ratio needs."""
    ratios: list[list[float]] = []

    class Epochs(ClippedRatio):
        def _losses(self, samples: EpisodicRolloutBufferSamples, values: th.Tensor, log_prob: th.Tensor, *args: Any) -> Losses:
            assert samples.old_log_prob is not None
            ratios[-1].append(float((log_prob - samples.old_log_prob).detach().abs().max()))
            return super()._losses(samples, values, log_prob, *args)

        def train(self) -> None:
            ratios.append([])
            for _ in range(4):
                super().train()

    Epochs("MlpPolicy", "CartPole-v1", learning_rate=0.01, seed=0, device="cpu").learn(500)
    updates = [ratio for ratio in ratios if ratio]
    assert updates and all(ratio[0] == 0 and min(ratio[1:]) > 1e-4 for ratio in updates)


@pytest.mark.parametrize("name", ["values", "log_probs", "advantages"])
def test_an_objective_may_read_the_buffer(name: str) -> None:
    """Between two passes, too: what it computes for that leaves the gradients alone."""

    class Reading(EpisodicA2C):
        def _losses(self, samples: EpisodicRolloutBufferSamples, *args: Any) -> Losses:
            assert len(getattr(self.rollout_buffer, name)) == self.rollout_buffer.size()
            return super()._losses(samples, *args)

    reading, plain = (
        algorithm("MlpPolicy", "CartPole-v1", batch_size=5, seed=0, device="cpu").learn(300)
        for algorithm in (Reading, EpisodicA2C)
    )
    assert th.equal(parameters_of(reading), parameters_of(plain))
