"""The policies: SB3's own and the notebook's network with shared layers, their value head and their optimizer."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_episodic_a2c.returns import EPSILON, ReturnStatistics

MlpPolicy = ActorCriticPolicy
CnnPolicy = ActorCriticCnnPolicy
MultiInputPolicy = MultiInputActorCriticPolicy


class SharedMlpExtractor(nn.Module):
    """
    One stack of fully connected layers whose output is the latent of both heads.

    It has the interface of SB3's ``MlpExtractor``, from which shared layers were removed in SB3 1.8.

    :param features_dim: Size of the input
    :param net_arch: Sizes of the shared layers
    :param activation_fn: Activation after each layer
    """

    def __init__(self, features_dim: int, net_arch: list[int], activation_fn: type[nn.Module]) -> None:
        super().__init__()
        self.shared_net = nn.Sequential(*create_mlp(features_dim, -1, net_arch, activation_fn))
        self.latent_dim_pi = self.latent_dim_vf = net_arch[-1] if net_arch else features_dim

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param features: ``(n, features_dim)``
        :return: The latent of the actor and that of the critic: the same ``(n, latent_dim)`` tensor, computed once
        """
        latent = self.shared_net(features)
        return latent, latent

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return self.shared_net(features)

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return self.shared_net(features)


class SharedMlpPolicy(ActorCriticPolicy):
    """
    The notebook's network: shared hidden layers (by default one of 128 ReLU units), with an action head and a value head.

    All other arguments are those of SB3's ``ActorCriticPolicy``.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule
    :param net_arch: Sizes of the shared layers; ``[128]`` if None
    :param activation_fn: Activation after each shared layer
    :param ortho_init: ``False`` (default): initialise as Keras does, and so the notebook (Glorot & Bengio, 2010,
        uniform weights; zero biases). ``True``: SB3's orthogonal initialisation
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        ortho_init: bool = False,
        **kwargs: Any,
    ) -> None:
        if net_arch is None:
            net_arch = [128]
        if not isinstance(net_arch, (list, tuple)) or not all(isinstance(width, int) and width > 0 for width in net_arch):
            raise ValueError(
                f"`net_arch` of SharedMlpPolicy must be a list of positive layer sizes, got {net_arch!r}. "
                'All its layers are shared: use "MlpPolicy" for separate ones (dict(pi=[...], vf=[...])).'
            )
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=list(net_arch),
            activation_fn=activation_fn,
            ortho_init=ortho_init,
            **kwargs,
        )

    def _build_mlp_extractor(self) -> None:
        assert isinstance(self.net_arch, list)
        self.mlp_extractor = SharedMlpExtractor(  # type: ignore[assignment]  # SB3 names its own class; same interface
            self.features_dim, self.net_arch, self.activation_fn
        ).to(self.device)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        if not self.ortho_init:
            for module in (self.mlp_extractor, self.action_net, self.value_net):
                module.apply(_init_keras_dense)


def _init_keras_dense(module: nn.Module) -> None:
    """Initialise a linear layer as ``keras.layers.Dense`` does."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def rescale_value_head(policy: BasePolicy, old: ReturnStatistics, new: ReturnStatistics) -> None:
    """
    Make a critic that was in the units of ``old`` predict the same returns in the units of ``new``.

    Otherwise the predictions, and the advantages with them, would shift at every update, as the statistics move. This is the
    output preservation of PopArt (van Hasselt et al., 2016, https://arxiv.org/abs/1602.07714).

    :param policy: A policy whose last layer of the critic is the linear ``value_net``, as in all of SB3's; others, and one
        whose weight is pruned or parametrized, are left as they are
    :param old: The statistics that the critic was trained with; the initial ones for raw returns. Nothing is done if all
        returns were equal
    :param new: The statistics that it will be trained with
    """
    value_net = getattr(policy, "value_net", None)
    # `th.compile` wraps it
    value_net = getattr(value_net, "_orig_mod", value_net)
    if not isinstance(value_net, nn.Linear) or value_net.bias is None or old == new or old.std <= EPSILON:
        return
    if "weight" not in value_net._parameters:
        # Computed from other parameters, e.g. pruned or normalized: writing to it would have no effect
        return
    old_scale, new_scale = old.std + EPSILON, new.std + EPSILON
    scale = old_scale / new_scale
    with th.no_grad():
        value_net.weight.mul_(scale)
        value_net.bias.mul_(scale).add_((old.mean - new.mean) / new_scale)


def fuse_adam(policy: BasePolicy) -> None:
    """
    Run the Adam that SB3 has made in one kernel, which is several times faster for small networks.

    The optimizer object stays, and so does every choice of the user or the policy: another optimizer, parameter groups,
    ``fused`` or ``foreach`` in ``optimizer_kwargs``.

    :param policy: A new policy on its device
    """
    optimizer, kwargs = policy.optimizer, policy.optimizer_kwargs
    if type(optimizer) is not th.optim.Adam or optimizer.state or len(optimizer.param_groups) != 1:
        return
    (group,) = optimizer.param_groups
    parameters = list(policy.parameters())
    settings = {name: value for name, value in group.items() if name != "params"}
    try:
        made_by_sb3 = th.optim.Adam(parameters, lr=optimizer.defaults["lr"], **kwargs).defaults
        # One parameter of each kind shows whether torch has a fused kernel for it
        kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
        probes = [th.zeros(1, dtype=dtype, device=device, requires_grad=True) for dtype, device in kinds]
        for probe in probes:
            probe.grad = th.zeros_like(probe)
        th.optim.Adam(probes, lr=0.0, fused=True).step()
    except (RuntimeError, TypeError, ValueError):
        return
    is_made_by_sb3 = (
        optimizer.defaults == settings == made_by_sb3
        and kwargs.get("fused") is None
        and kwargs.get("foreach") is None
        and [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in parameters]
    )
    if is_made_by_sb3:
        group["fused"] = optimizer.defaults["fused"] = True
