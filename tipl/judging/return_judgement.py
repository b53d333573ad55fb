"""Held-out trials in the simulator: what forecast policies return, and how they act beside the true ones.

Shapes  N policies, E episodes for each policy, p weights.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tipl.collecting.episodes import Episodes
from tipl.judging.action_metrics import FloatArray, action_differences, action_variance, kl_divergences
from tipl.judging.evaluate_config import EvaluateConfig
from tipl.judging.weight_judgement import Case, Policies
from tipl.policy import PolicySpec

NUM_STATES = 256
"""States on which actions are compared, at most: an error in a mean over them of some percent, for a few MB."""

Run = Callable[..., Episodes]
"""Runs policies of weights (N, p) on the episodes of seeds (N, E)."""


@dataclass(frozen=True)
class ReturnJudgement:
    """How one case's two policies do; actions are not compared for the return floor, whose policy is the true one."""

    action_difference: float | None
    kl: float | None
    """None too where it is infinite, and for policies without a distribution of their own."""
    return_true: float
    return_predicted: float


def episode_seeds(config: EvaluateConfig, trial: int) -> NDArray[np.int64]:
    """Return the seeds (2, E) of a trial's episodes: those that policies are judged on, and others for the floor."""
    return np.random.default_rng((config.seed, trial)).integers(2**31, size=(2, config.num_episodes))


def judge_returns(
    policy: PolicySpec,
    bounds: FloatArray,
    cases: Sequence[Case],
    policies: Policies,
    seeds: Mapping[int, NDArray[np.int64]],
    run: Run,
) -> tuple[list[ReturnJudgement], list[dict[str, Any]]]:
    """Return a judgement of each case, on the episodes of its trial, `seeds` (2, E), and the policies' diversity.

    `bounds` are the lowest and the highest action (2, A).
    """
    weights = np.array(policies.weights)
    of_policy = np.array([seeds[trial] for trial in policies.trials])  # (N, 2, E)
    true_policies = sorted({case.true for case in cases})
    returns = run(weights, of_policy[:, 0]).returns.mean(1)
    again = run(weights[true_policies], of_policy[true_policies, 1], num_states=NUM_STATES)
    on_other_seeds = dict(zip(true_policies, again.returns.mean(1), strict=True))
    states = dict(zip(true_policies, again.states, strict=True))
    diversity = _diversity(cases, policy, weights, returns, states, bounds)
    actions = _compared_actions(cases, policy, weights, states, bounds)
    judgements = []
    for case, (difference, kl) in zip(cases, actions, strict=True):
        is_floor = case.predictor == "return_floor"  # the true policy once more, on other episodes
        predicted = on_other_seeds[case.true] if is_floor else returns[case.predicted]
        judgements.append(ReturnJudgement(difference, kl, float(returns[case.true]), float(predicted)))
    return judgements, diversity


def _compared_actions(
    cases: Sequence[Case],
    policy: PolicySpec,
    weights: NDArray[np.float32],
    states: Mapping[int, NDArray[np.float32]],
    bounds: FloatArray,
) -> list[tuple[float | None, float | None]]:
    """Return the action difference and KL divergence of each case, None for the return floor's."""
    found: list[tuple[float | None, float | None]] = [(None, None)] * len(cases)
    of_truth: dict[int, list[int]] = {}
    for i, case in enumerate(cases):
        if case.predictor != "return_floor":
            of_truth.setdefault(case.true, []).append(i)
    for true, those in of_truth.items():
        pair = weights[true], weights[[cases[i].predicted for i in those]]
        differences = action_differences(policy, *pair, states[true], bounds)
        divergences = kl_divergences(policy, *pair, states[true])
        for i, difference, kl in zip(those, differences, divergences, strict=True):
            found[i] = float(difference), _finite(kl)
    return found


def _diversity(
    cases: Sequence[Case],
    policy: PolicySpec,
    weights: NDArray[np.float32],
    returns: NDArray[np.float64],
    states: Mapping[int, NDArray[np.float32]],
    bounds: FloatArray,
) -> list[dict[str, Any]]:
    """Return how much the held-out trials' policies differ, for each prefix, horizon and predictor, and the "truth".

    All policies of one prefix and horizon act on the same states, drawn from those of its true policies. Null where
    one trial is held out.
    """
    members_of: dict[tuple[float, int], dict[str, list[int]]] = {}
    for case in cases:
        found = members_of.setdefault((case.prefix, case.horizon), {})
        name = "truth" if case.predictor == "return_floor" else case.predictor
        found.setdefault(name, []).append(case.predicted)
    entries = []
    for (prefix, horizon), found in members_of.items():
        pool = np.concatenate([states[true] for true in found["truth"]])
        chosen = pool[np.random.default_rng(horizon).permutation(len(pool))[:NUM_STATES]]
        for name, members in found.items():
            variance, std = math.nan, math.nan
            if len(members) > 1:
                variance = action_variance(policy, weights[members], chosen, bounds)
                std = float(returns[members].std(ddof=1))
            entries.append({
                "prefix": prefix, "horizon": horizon, "predictor": name,
                "action_variance": _finite(variance), "return_std": _finite(std),
            })  # fmt: skip
    return entries


def _finite(value: float) -> float | None:
    """Return what JSON can hold."""
    return float(value) if math.isfinite(value) else None
