"""The parameters that trials start from: those of Stable-Baselines3's actor and critic.

They are drawn as SB3 draws them. Orthogonal weights, SB3's default, are then decomposed in float64 and rounded once, so
that they are the same on every CPU. SB3's own differ from them by up to some 1e-6: in float32, LAPACK's last bits vary
with the CPU's maker and the number of threads. All other parameters are SB3's to the bit.

Shapes  N trials; P parameters of a trial, ordered log_std | actor | critic; of discrete actions there is no log_std.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl.collecting.policy_network import layer_views
from tipl.collecting.ppo_config import PPOConfig
from tipl.policy import PolicySpec

Singles = NDArray[np.float32]


def critic_sizes(spec: PolicySpec) -> tuple[int, ...]:
    """Return the widths of the critic's MLP, from the observation to the value."""
    return (*spec.layer_sizes[:-1], 1)


def initial_parameters(spec: PolicySpec, config: PPOConfig, generators: Sequence[torch.Generator]) -> Singles:
    """Return SB3's initial parameters (N, P); row i is drawn from generators[i]."""
    sizes = critic_sizes(spec)
    P = spec.num_params + sum(fan_out * (fan_in + 1) for fan_in, fan_out in itertools.pairwise(sizes))
    num_log_stds = 0 if spec.discrete else spec.act_dim
    params = torch.zeros(len(generators), P)
    params[:, :num_log_stds] = config.log_std_init
    for row, generator in zip(params, generators, strict=True):
        *actor, action_net = layer_views(row[None, num_log_stds:], spec.layer_sizes)
        *critic, value_net = layer_views(row[None, spec.num_params :], sizes)
        if config.ortho_init:
            for hidden, head, head_gain in ((actor, action_net, 0.01), (critic, value_net, 1.0)):
                for weight, _ in hidden:
                    _orthogonal(weight[0], math.sqrt(2), generator)
                _orthogonal(head[0][0], head_gain, generator)
        else:
            for weight, bias in (*actor, *critic, action_net, value_net):  # the order in which SB3 makes them
                bound = 1 / math.sqrt(weight.shape[-1])
                torch.nn.init.kaiming_uniform_(weight[0], math.sqrt(5), generator=generator)
                torch.nn.init.uniform_(bias[0], -bound, bound, generator)
    return params.numpy()


def _orthogonal(weight: Tensor, gain: float, generator: torch.Generator) -> None:
    """Fill a matrix as torch.nn.init.orthogonal_ does, but decompose what was drawn in float64."""
    drawn = torch.empty(weight.shape).normal_(0.0, 1.0, generator=generator).double().numpy()
    is_wide = drawn.shape[0] < drawn.shape[1]
    q, r = np.linalg.qr(drawn.T if is_wide else drawn)
    q = q * np.sign(np.diag(r))
    weight.copy_(torch.from_numpy(gain * (q.T if is_wide else q)))
