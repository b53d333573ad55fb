"""What the words of the report mean, and how far its numbers carry."""

from tipl.report.page import Html, element, join
from tipl.report.results import Results, predictor_info


def reading(results: Results) -> Html:
    """Return the list of terms, predictors among them, and of caveats."""
    num_trials = len(results.trials)
    saw = "was trained on all of them" if results.in_sample else "never saw the held-out ones"
    terms = [
        ("trial", f"one PPO run from a random initialisation; the forecaster {saw}"),
        ("checkpoint", "the policy's weights after one PPO iteration; a path is a trial's row of checkpoints"),
        ("prefix", "the part of a path that is seen, as a share of it; the forecast continues it"),
        ("horizon", "how many checkpoints ahead of the prefix's end a forecast lies"),
        ("WPE", "weight prediction error: the mean squared difference between forecast and true weights"),
        (
            "relative error",
            "|forecast \N{MINUS SIGN} true| / |true \N{MINUS SIGN} initial|: 0 is perfect, 1 as wrong as the "
            "initial weights",
        ),
        (
            "REPW",
            "return error of predicted weights: |return of the true policy \N{MINUS SIGN} return of the forecast "
            "policy|, with deterministic actions, on the same episodes, which are each trial's own",
        ),
        (
            "future gain",
            "return of the true policy minus return of the policy at the prefix's end; the ratio of means is given "
            "where its whole interval lies above the return noise, a trial's own share where its own gain does",
        ),
        (
            "IQM",
            "interquartile mean, the mean of the middle half of the trials (Agarwal et al. 2021, arXiv 2108.13264)",
        ),
        (
            "action difference",
            "root mean square over states and dimensions of the difference between the deterministic actions of "
            "forecast and true policy, clipped to the action space and divided by half its range: at most 2",
        ),
        (
            "KL",
            "KL(true || forecast) of the two Gaussian policies, standard deviations included, mean over states "
            "that the true policy visits, in nats",
        ),
        (
            "action variance",
            "variance of the deterministic action, in the same units, between the held-out trials' policies in one "
            "state, mean over states and dimensions",
        ),
        (
            "confidence",
            "the probability, predicted with a forecast, that its policy earns a higher return than the prefix's last",
        ),
        (
            "distance to a training path",
            "between what two paths do from the prefix's end to their own, each in the canonical coordinates of its "
            "own prefix (Temporal SVD, divided by the distance walked so far)",
        ),
        (
            "interval",
            "95 % percentile bootstrap over held-out trials (10,000 resamples, fixed seed); percentages against "
            "persistence compare the two on the same trials, so that they are tighter than the separate intervals",
        ),
    ]
    terms += [(predictor_info(n).label, predictor_info(n).description) for n in results.names]
    caveats = [
        "Everything rests on one held-out trial: it has no interval, and another could behave otherwise."
        if num_trials == 1
        else f"Everything rests on {num_trials} held-out trials."
        + " With so few, bootstrap intervals are somewhat too narrow." * (num_trials < 20),
        f"One task ({results.env_id}), one algorithm, one set of hyperparameters: others can differ.",
        "Weights and returns are different judges: a small weight error need not mean a good policy, nor a large "
        "one a bad policy.",
        "The floors know the answer; they are not predictors. The basis floor bounds weight errors, not returns: "
        "there a forecast may do better.",
    ]
    entries = (join(element("dt", term), element("dd", f"{text}.")) for term, text in terms)
    listing = element("ul", *(element("li", text) for text in caveats))
    return join(element("dl", *entries, cls="terms"), element("h3", "Caveats"), listing)
