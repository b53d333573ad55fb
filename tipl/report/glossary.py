"""The report's glossary and its caveats: what its terms mean, and what its numbers do not show."""

from tipl.report.page import Html, element, join
from tipl.report.predictor_info import predictor_info
from tipl.report.results import Results


def reading(results: Results) -> Html:
    """Return a list of the report's terms, predictors included, and a list of caveats."""
    saw = "was trained on all of them" if results.in_sample else "never saw the held-out ones"
    terms = [("trial", f"one PPO run from a random initialisation; the forecaster {saw}"), *TERMS]
    terms += [(predictor_info(n).label, predictor_info(n).description) for n in results.names]
    entries = (join(element("dt", term), element("dd", f"{text}.")) for term, text in terms)
    listing = element("ul", *(element("li", text) for text in _caveats(results)))
    return join(element("dl", *entries, cls="terms"), element("h3", "Caveats"), listing)


TERMS = (
    ("checkpoint", "the policy's weights after one PPO iteration; a path is the sequence of a trial's checkpoints"),
    ("prefix", "the observed beginning of a path, given as a share of the whole; the forecast continues it"),
    ("horizon", "the number of checkpoints from the prefix's end to the forecast one"),
    ("WPE", "weight prediction error: the mean squared difference between forecast and true weights"),
    (
        "relative error",
        "|forecast \N{MINUS SIGN} true| / |true \N{MINUS SIGN} initial|, over all weights: 0 is perfect, 1 is as wrong "
        "as the initial weights",
    ),
    (
        "REPW",
        "return error of predicted weights: |return of the true policy \N{MINUS SIGN} return of the forecast "
        "policy|, with deterministic actions, both run on the same episode seeds; each trial has its own seeds",
    ),
    (
        "future gain",
        "return of the true policy minus return of the policy at the prefix's end; the ratio of means is shown only "
        "where the whole interval of the mean gain lies above the return noise, and a trial's own share is counted "
        "only where that trial's gain does",
    ),
    (
        "IQM",
        "interquartile mean, the mean of the middle half of the trials (Agarwal et al. 2021, arXiv 2108.13264)",
    ),
    (
        "action difference",
        "difference between the deterministic actions of the forecast and the true policy, clipped to the action space "
        "and divided by half its range; root mean square over states and action dimensions, at most 2; for discrete "
        "actions the share of states in which the two differ",
    ),
    (
        "KL",
        "KL(true || forecast) of the two policies as they act in training, Gaussians or the probabilities of discrete "
        "actions; mean over states that the true policy visits, in nats; none for policies of TD3 and DQN, nor with "
        "gSDE",
    ),
    (
        "action variance",
        "variance of the deterministic actions of the held-out trials' policies in the same state, in the units of the "
        "action difference; mean over states and action dimensions; for discrete actions the probability that two of "
        "the policies differ",
    ),
    (
        "confidence",
        "predicted probability that the forecast policy has a higher return than the policy at the prefix's end",
    ),
    (
        "distance to a training path",
        "distance between two paths' displacements from the prefix's end to the path's end, each in the canonical "
        "coordinates of its own prefix (Temporal SVD, divided by the distance from the start to the prefix's end)",
    ),
    (
        "interval",
        "95 % percentile bootstrap over held-out trials (10,000 resamples, fixed seed); comparisons with persistence "
        "are paired by trial, so that their intervals are narrower than the two separate ones suggest",
    ),
)


def _caveats(results: Results) -> list[str]:
    """Return how far the results carry, one sentence or two for each limit."""
    num_trials = len(results.trials)
    evidence = f"All numbers rest on {num_trials} held-out trials."
    if num_trials == 1:
        evidence = "All numbers rest on one held-out trial: there are no intervals, and another trial may differ."
    elif num_trials < 20:
        evidence += " With so few, bootstrap intervals are somewhat too narrow."
    return [
        evidence,
        f"One task ({results.env_id}), one algorithm, one set of hyperparameters: others may differ.",
        "Weight error and return measure different things: a small weight error need not mean a good policy, nor a "
        "large one a bad policy.",
        "The floors are computed from the true weights; they are not predictors. The basis floor bounds weight errors, "
        "not returns: a forecast may have a better return than the floor.",
    ]
