"""The page of `tipl reproduce`: every regime on every task, side by side.

Each regime begins with a sentence computed from its numbers. Then come WPE and REPW against the horizon, one row of
panels per regime and one column per prefix, and tables for the end of the path. Links lead to each evaluation's report.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tipl.files.locations import write_atomically
from tipl.report import page, plots
from tipl.report.drawing import Plot, percent
from tipl.report.intervals import Bootstrap, Estimate, mean, ranking, tipl_leads
from tipl.report.page import Html, element, escape, fmt, fmt_percent, fmt_seconds, listed
from tipl.report.predictor_info import BASIS_FLOORS, predictor_info
from tipl.report.results import FloatArray, Results
from tipl.report.tables import error_table

SHOWN = (
    *("tipl", "persistence", "linear", "mean_path", "ridge", "nowcaster"),
    *BASIS_FLOORS,
    "return_floor",
)
"""The predictors in the figures, few enough to be told apart. The tables have all predictors."""

PANEL_INCHES = (3.4, 2.55)
PNG_DPI, PNG_COLORS = 110, 128  # about 90 kB for twelve panels, small enough to commit

MEASURES = {
    "wpe": ("wpe_relative", "relative weight error", BASIS_FLOORS),
    "repw": ("repw", "return error (REPW)", (*BASIS_FLOORS, "return_floor")),
}
"""Name of a figure -> its measure, the label of its axis, and the floors that it shows."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One regime on one task."""

    regime: str
    title: str
    description: str
    results: Results
    report: str
    """Link to the evaluation's report, relative to this page."""

    @property
    def bootstrap(self) -> Bootstrap:
        return Bootstrap(len(self.results.trials))


def write_reproduction(output: Path, parts: Sequence[Part], *, seconds: Mapping[str, float]) -> Path:
    """Write the page to the file `output` and its figures as PNG files into the same folder; return `output`.

    `seconds` is stage -> its duration. Writing begins once everything has been made, and the page is written last.
    """
    figures = {
        env_id: {name: _figure(name, env_id, of_task) for name in MEASURES} for env_id, of_task in _by_task(parts)
    }
    body = _body(parts, figures, seconds)
    files = {plot.name: plot.png(PNG_DPI, PNG_COLORS) for of_task in figures.values() for plot in of_task.values()}
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomically(output.with_name(f"{name}.png"), data)
    write_atomically(output, page.document("tipl: the experiment reproduced", body))
    return output


def _by_task(parts: Sequence[Part]) -> list[tuple[str, list[Part]]]:
    env_ids = dict.fromkeys(part.results.env_id for part in parts)
    return [(env_id, [part for part in parts if part.results.env_id == env_id]) for env_id in env_ids]


def _by_regime(parts: Sequence[Part]) -> list[list[Part]]:
    return [[part for part in parts if part.regime == regime] for regime in dict.fromkeys(it.regime for it in parts)]


# ----------------------------------------------------------------------------------------------- the page


def _body(parts: Sequence[Part], figures: Mapping[str, Mapping[str, Plot]], seconds: Mapping[str, float]) -> Html:
    sections = [("findings", "What came out", page.join(*map(_finding, _by_regime(parts))))]
    sections += [(env_id, env_id, _task(of_task, figures[env_id])) for env_id, of_task in _by_task(parts)]
    sections += [("reports", "Full reports", _reports(parts)), ("reading", "How to read this", _reading(parts))]
    header = element(
        "header",
        element("h1", "TIPL's experiment, reproduced and extended"),
        element(
            "p",
            "Forecasting PPO's policy weights as trajectories (Tang 2025, arXiv 2503.04074), on held-out runs and on "
            "training runs, beside the predictors that a forecast must beat.",
            cls="sub",
        ),
        _facts(parts, seconds),
    )
    links = (Html(f'<a href="#{anchor}">{escape(title)}</a>') for anchor, title, _ in sections)
    main = element("main", *(page.section(*content) for content in sections))
    version = parts[0].results.tipl_version
    footer = f"Made by tipl {version}. All rows are in results.json; each figure is also a PNG file beside this page."
    return page.join(header, element("nav", element("div", *links)), main, element("footer", footer))


def _facts(parts: Sequence[Part], seconds: Mapping[str, float]) -> Html:
    items = []
    for env_id, of_task in _by_task(parts):
        settings = of_task[0].results.settings
        items.append((env_id, f"{settings['num_trials']} trials of {settings['num_checkpoints']} checkpoints"))
    items.append(("Regimes", listed(dict.fromkeys(part.regime for part in parts))))
    if seconds:
        items.append(("Time, all stages", fmt_seconds(sum(seconds.values()))))
    machine = parts[0].results.machine
    if {"cpu", "cores"} <= machine.keys():
        items.append(("Machine", f"{machine['cpu']}, {machine['cores']} cores"))
    return page.facts(items)


def _finding(parts: Sequence[Part]) -> Html:
    """Return a regime's result: a sentence over all tasks, each task's numbers, and the regime's description."""
    return page.join(
        element("h3", parts[0].title),
        element("p", headline(parts), cls="lead"),
        *(element("p", numbers(part)) for part in parts),
        element("p", parts[0].description, cls="quiet"),
    )


def headline(parts: Sequence[Part]) -> str:
    """Return in words at how many prefixes TIPL's final weight error beats persistence's, and all others', by task."""
    in_sample = parts[0].results.in_sample
    beaten, first = [], []
    for part in parts:
        prefixes, env_id = part.results.prefixes, part.results.env_id
        beaten.append(f"{sum(it.high < 1.0 for it in _ratios(part))} of {len(prefixes)} prefixes on {env_id}")
        wins = sum(tipl_leads(ranking(part.results, "wpe_relative", f)) for f in prefixes)
        first.append(f"{wins} of {len(prefixes)} on {env_id}")
    who = "Trials that were trained on: TIPL" if in_sample else "Held-out trials: TIPL"
    words = f"{who} beats persistence, beyond the noise of the trials, at {listed(beaten)}"
    if in_sample:  # the nearest path is then the trial's own, so that a comparison with it means nothing
        return f"{words}. This is a fit, not a forecast."
    return f"{words}; its weight error is the smallest of all predictors' at {listed(first)}."


def numbers(part: Part) -> str:
    """Return a regime's errors on a task in words: TIPL's, compared with persistence's, and the basis floor's."""
    results = part.results
    ends = {name: [results.at_end("wpe_relative", f, name) for f in results.prefixes] for name in results.names}
    shares = listed(fmt_percent(1.0 - ratio.value) for ratio in _ratios(part))
    higher = sum(ratio.low > 1.0 for ratio in _ratios(part))
    words = (
        f"{results.env_id}, prefixes of {listed(map(percent, results.prefixes))} of the path: relative weight error at "
        f"its end {_means(ends['tipl'])}, lower than persistence's by {shares}"
    )
    words += f" (higher beyond the noise at {higher} of {len(results.prefixes)} prefixes)" * (higher > 0)
    return f"{words}. The basis floor is {_means(ends['basis_floor'])}." if "basis_floor" in ends else f"{words}."


def _ratios(part: Part) -> list[Estimate]:
    """Return TIPL's error at the end of the path as a share of persistence's, for each prefix."""
    results, bootstrap = part.results, part.bootstrap
    pairs = ([results.at_end("wpe_relative", f, name) for name in ("tipl", "persistence")] for f in results.prefixes)
    return [bootstrap.ratio(*pair) for pair in pairs]


def _means(columns: Iterable[FloatArray]) -> str:
    return listed(fmt(float(mean(values[:, None])[0])) for values in columns)


def _task(parts: Sequence[Part], figures: Mapping[str, Plot]) -> Html:
    names = listed(part.regime for part in parts)
    weights = (
        f"Relative weight error against the horizon, one row per regime ({names}) and one column per prefix: means "
        "over the judged trials, with 95 % bands for TIPL, persistence and the floor, below which no forecast within "
        "the basis can go."
    )
    returns = (
        "Return error against the horizon, likewise. A difference below the dotted line comes from the choice of "
        "episodes, not from the policy."
    )
    content = [element("h3", "Weights"), page.figure(figures["wpe"], weights)]
    content += [_table(part, "wpe_relative", "Relative weight error") for part in parts]
    content += [element("h3", "Returns"), page.figure(figures["repw"], returns)]
    content += [_table(part, "repw", "Return error (REPW)") for part in parts]
    return page.join(*content)


def _table(part: Part, measure: str, title: str) -> Html:
    results = part.results
    names = [n for n in results.names if not (n == "return_floor" and measure.startswith("wpe"))]
    count = len(results.trials)
    judged = f"{count} {'' if results.in_sample else 'held-out '}{'trials' if count > 1 else 'trial'}"
    judged += " trained on" * results.in_sample
    caption = f"{title} at the end of the path, {part.regime}: mean over {judged}, with its 95 % interval below."
    return error_table(results, part.bootstrap, caption, measure, names)


def _figure(name: str, env_id: str, parts: Sequence[Part]) -> Plot:
    """Return a measure against the horizon, one row of panels per regime and one column per prefix."""
    measure, label, floors = MEASURES[name]
    rows = []
    for part in parts:
        results = part.results
        few = dataclasses.replace(results, names=tuple(n for n in results.names if n in SHOWN))
        rows.append(plots.error_plot(name, few, part.bootstrap, measure, f"{part.regime}\n{label}", floors))
    return Plot(
        f"{env_id}_{name}",
        tuple(panel for row in rows for panel in row.panels),
        tuple(dict.fromkeys(mark for row in rows for mark in row.legend)),
        columns=max(len(row.panels) for row in rows),
        panel_inches=PANEL_INCHES,
    )


def _reports(parts: Sequence[Part]) -> Html:
    links = (
        element("li", Html(f'<a href="{escape(part.report)}">{escape(f"{part.results.env_id}, {part.regime}")}</a>'))
        for part in parts
    )
    words = "The report of each evaluation, with actions, shares of the return gain, coordinates and settings:"
    return page.join(element("p", words), element("ul", *links))


def _reading(parts: Sequence[Part]) -> Html:
    names = dict.fromkeys(n for part in parts for n in part.results.names)
    terms = [(part[0].regime, part[0].description) for part in _by_regime(parts)]
    terms += [
        (
            "relative error",
            "|forecast \N{MINUS SIGN} true| / |true \N{MINUS SIGN} initial|, over all weights: 0 is perfect, 1 is as "
            "wrong as the initial weights.",
        ),
        ("REPW", "The absolute difference in mean episodic return between the forecast and the true policy."),
        ("interval", "95 % percentile bootstrap over the judged trials (10,000 resamples, fixed seed)."),
    ]
    terms += [(predictor_info(n).label, f"{predictor_info(n).description}.") for n in names]
    entries = (page.join(element("dt", term), element("dd", text)) for term, text in terms)
    return element("dl", *entries, cls="terms")
