"""The report's verdict in words: is TIPL the best forecast of the weights, and how much return does it gain?

Every judgement is computed from means over held-out trials and their intervals, and says where a difference is within
the noise.
"""

import math
from collections.abc import Mapping

from tipl.report.drawing import percent
from tipl.report.intervals import OWN, Bootstrap, Estimate, Gain, ranking, tipl_leads
from tipl.report.page import Html, element, fmt, fmt_interval, fmt_percent, join, listed, with_interval
from tipl.report.predictor_info import predictor_info
from tipl.report.results import Results

IN_SAMPLE = (
    "In-sample: the forecaster and every other predictor that learns were trained on the very trials that are judged "
    "here. This shows what they can fit, and says nothing about new runs."
)


def verdict(results: Results, bootstrap: Bootstrap, gains: Mapping[float, Gain]) -> Html:
    """Return the leading sentences and one card per prefix; `gains` are `captured_gain` by prefix."""
    if "tipl" not in results.names:
        return element("p", "These results hold no forecast of TIPL.", cls="lead")
    lead = [] if not results.in_sample else [element("p", IN_SAMPLE, cls="lead")]
    cards = (_card(results, bootstrap, prefix, gains[prefix]) for prefix in results.prefixes)
    return join(
        *lead,
        element("p", _weight_verdict(results, bootstrap), cls="lead"),
        element("p", _return_verdict(results, gains)),
        element("div", *cards, cls="cards"),
    )


def _weight_verdict(results: Results, bootstrap: Bootstrap) -> str:
    """Return in words at which prefixes TIPL has the smallest mean error, and where that may be chance."""
    if len(results.predictors) == 1:
        return "These results hold no other predictor to compare TIPL with."
    prefixes = results.prefixes
    ranked = {f: ranking(results, "wpe_relative", f) for f in prefixes}
    wins = [f for f in prefixes if tipl_leads(ranked[f])]
    if not wins:
        return "TIPL is not the best forecast of the weights at the end of the path, at any prefix."
    where = f" at {len(wins)} of {len(prefixes)} prefixes: {listed(percent(f) for f in wins)}"
    if len(wins) == len(prefixes):
        where = ", at every prefix" if len(wins) > 1 else f", after {percent(wins[0])} of it"
    claim = f"TIPL forecasts the weights at the end of the path better than every other predictor{where}."
    if len(results.trials) == 1:
        return f"{claim} This is one held-out trial."
    contested = [f for f in wins if len(ranked[f]) > 1 and _change(results, bootstrap, f, ranked[f][1][0])[0].low <= 0]
    if contested:
        claim += f" At {listed(percent(f) for f in contested)} its lead is within the noise of the trials."
    return claim


def _return_verdict(results: Results, gains: Mapping[float, Gain]) -> str:
    """Return one or two sentences on the share of the future gain in return that TIPL captures."""
    if not any(gain.is_measured for gain in gains.values()):
        return "Nothing can be said about the return: the results hold no returns of persistence and the truth."
    shares = {f: gain.shares["tipl"] for f, gain in gains.items() if "tipl" in gain.shares}
    sentences = []
    if shares:
        captured = listed(f"{_share(share)} after {percent(f)} of the path" for f, share in shares.items())
        wins = sum(tipl_leads(gains[f].ranking) for f in shares)
        rank = ""
        if len(results.predictors) > 2:
            often = f" at {wins or 'none'} of these {len(shares)} prefixes" if len(shares) > 1 else ""
            rank = ", more than every other predictor" if wins or often else ", not more than every other predictor"
            rank += often
        sentences.append(f"Of the return that the run still gains, TIPL's policies capture {captured}{rank}.")
    without = [percent(f) for f in results.prefixes if f not in shares]
    if without:
        sentences.append(f"After {listed(without)} of the path no gain in return stands out of the noise.")
    return " ".join(sentences)


def _card(results: Results, bootstrap: Bootstrap, prefix: float, gain: Gain) -> Html:
    """Return the verdict on one prefix: weight error against persistence and the other predictors, then return."""
    ranked = ranking(results, "wpe_relative", prefix)
    tipl = bootstrap.estimate(results.at_end("wpe_relative", prefix, "tipl"))
    persistence = bootstrap.estimate(results.at_end("wpe_relative", prefix, "persistence"))
    error = f"TIPL's relative weight error at the end of the path is {with_interval(tipl)}"
    if math.isnan(persistence.value) or math.isnan(tipl.value):
        big, unit, lines = fmt(tipl.value), "relative weight error", [f"{error}."]
    else:
        change, word = _change(results, bootstrap, prefix, "persistence")
        big, unit = f"{fmt_percent(change.value)} {word}", "weight error than persistence"
        lines = [f"{error}, persistence's {fmt(persistence.value)}: {_share(change)} {word}."]
        if change.low <= 0 <= change.high:
            lines.append("The interval includes zero: a difference within the noise of these trials.")
    is_best = tipl_leads(ranked)
    rivals = [(name, value) for name, value in ranked if name not in OWN]
    ahead = [(name, value) for name, value in ranked if value < tipl.value or (value == tipl.value and name not in OWN)]
    if is_best and rivals:
        lines.append(f"✓ Below every other predictor; the nearest is {_named(*rivals[0])}.")
    elif ahead and not math.isnan(tipl.value):
        lines.append(f"✗ Not the best: {listed(_named(*rival) for rival in ahead)}.")
    lines.append(f"Return: {_gain_words(gain)}.")
    head = (
        element("h3", f"After {percent(prefix)} of the path"),
        element("p", big, cls="big"),
        element("p", unit, cls="unit"),
    )
    return element("div", *head, *(element("p", line) for line in lines), cls="card good" if is_best else "card")


def _change(results: Results, bootstrap: Bootstrap, prefix: float, reference: str) -> tuple[Estimate, str]:
    """Return TIPL's relative change in error at the end of the path against the reference, and "lower" or "higher"."""
    ratio = bootstrap.ratio(*(results.at_end("wpe_relative", prefix, name) for name in ("tipl", reference)))
    if ratio.value > 1:
        return Estimate(ratio.value - 1, ratio.low - 1, ratio.high - 1), "higher"
    return Estimate(1 - ratio.value, 1 - ratio.high, 1 - ratio.low), "lower"


def _gain_words(gain: Gain) -> str:
    if "tipl" not in gain.shares:
        return no_gain(gain)
    words = f"{_share(gain.shares['tipl'])} of the future gain of {fmt(gain.future.value)} captured"
    rivals = [(name, share) for name, share in gain.ranking if name != "tipl"]
    return f"{words}; {predictor_info(rivals[0][0]).label} {fmt_percent(rivals[0][1])}" if rivals else words


def no_gain(gain: Gain) -> str:
    """Return in words why there is no share of the gain to show."""
    if not gain.is_measured:
        return "not measured"
    if gain.shares:
        return "not measured for TIPL"
    noise = "" if math.isnan(gain.noise) else f", the return noise {fmt(gain.noise)}"
    reason = "the gain is too uncertain to share out" if gain.is_there else "no gain to capture"
    return f"{reason} (the true future's is {with_interval(gain.future)}{noise})"


def _named(name: str, value: float) -> str:
    return f"{predictor_info(name).label}, {fmt(value)}"


def _share(estimate: Estimate) -> str:
    return f"{fmt_percent(estimate.value)} {fmt_interval(estimate, as_percent=True)}".rstrip()
