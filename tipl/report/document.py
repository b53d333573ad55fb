"""One self-contained HTML page of an evaluation: what was run, what came out, and how far to trust it.

Reads `results.json` and `coordinates.safetensors` of `evaluate`, the store of `collect`, the loss curves of `train`.
Here are the doors and the sections; `page` is the HTML, `plots` and `run_plots` the figures, `paths` the spectra of
paths, `estimates` the intervals, `verdict` the words that judge, `trust` and `dynamics` two sections of their own,
`reading` the words that explain.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tipl.files.locations import write_atomically
from tipl.files.manifest import NAME as MANIFEST
from tipl.files.manifest import check_folder, write_manifest
from tipl.files.publishing import claimed, published, remove, remove_dead_claim
from tipl.report import page, plots, run_plots, verdict
from tipl.report.confidence import confidence_section
from tipl.report.glossary import reading
from tipl.report.intervals import (
    Bootstrap,
    Estimate,
    Gain,
    Statistic,
    captured_gain,
    leaders,
    standings,
)
from tipl.report.memorisation import dynamics_section
from tipl.report.page import Html, element, fmt, fmt_interval, fmt_percent, fmt_seconds
from tipl.report.paths import path_spectrum
from tipl.report.plots import NBSP, Plot, percent
from tipl.report.results import (
    BASIS_FLOORS,
    CoordinatePath,
    Results,
    Training,
    predictor_info,
    read_coordinates,
    read_results,
    read_training,
)
from tipl.report.tables import error_table, predictor_cell
from tipl.storing.store import Store

FIGURES = (
    "wpe",
    "repw",
    "return_gain",
    "gain_share",
    "returns",
    "action_difference",
    "kl",
    "reliability",
    "memorisation",
    "action_variance",
    "return_distribution",
    "coordinates",
    "spectrum",
    "learning_curves",
    "training",
)
COORDINATE_TRIALS = 2


def write_report(
    output: Path, *, evaluation: Path, store: Store, training: Path | None = None, overwrite: bool = False
) -> Path:
    """Write `report.html` and its figures as PNG files into the folder `output`; return the path of the page.

    `evaluation` is the folder that `tipl evaluate` wrote, `store` the trials that it judged, `training` the file
    `training.json` of the model. Nothing is written before the whole report is made, and the page comes last.

    Raises FileExistsError where `output` is a folder with something in it and `overwrite` is not set, FileNotFoundError
    where results are missing, RuntimeError where a file is damaged, ValueError where the results are not of this store.
    """
    output, evaluation = Path(output), Path(evaluation)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"write_report: output must be a folder, but {output} is a file")
    if output.exists() and any(output.iterdir()) and not overwrite:
        remove_dead_claim(output)
        raise FileExistsError(f"write_report: {output} exists and is not empty; pass overwrite=True to write there")

    results = read_results(evaluation / "results.json")
    check_folder(evaluation)
    _check_store(results, store)
    losses = read_training(Path(training)) if training is not None else None
    coordinates = evaluation / "coordinates.safetensors"
    paths = read_coordinates(coordinates) if coordinates.exists() else []

    report = _Report(results, store, losses, paths)
    body = report.body()  # makes the plots too
    files = {f"{plot.name}.png": plot.png() for plot in report.plots}
    html = page.document(f"tipl: {results.env_id}", body)
    if output.exists() and not any(output.iterdir()):
        output.rmdir()
    if not overwrite or not output.exists():
        with published(output, "report") as aside:
            _write_files(aside, files, html)
        return output / "report.html"
    with claimed(output, "report"):
        remove(output / MANIFEST)  # until all that it lists is there
        _write_files(output, files, html)
        for name in {f"{name}.png" for name in FIGURES} - files.keys():
            remove(output / name)  # of an earlier report that had more to show
        write_manifest(output)
    return output / "report.html"


def _write_files(folder: Path, figures: Mapping[str, bytes], html: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in figures.items():
        write_atomically(folder / name, data)
    write_atomically(folder / "report.html", html)


def _check_store(results: Results, store: Store) -> None:
    if store.env_id != results.env_id:
        raise ValueError(f"write_report: {results.path} is of env_id {results.env_id!r}, the store of {store.env_id!r}")
    if max(results.trials) >= store.num_trials:
        raise ValueError(
            f"write_report: {results.path} judges trial {max(results.trials)}, the store has {store.num_trials} trials"
        )


class _Report:
    """Builds the page from the top down; `plots` collects the figures that it shows."""

    def __init__(
        self, results: Results, store: Store, training: Training | None, paths: Sequence[CoordinatePath]
    ) -> None:
        self.results = results
        self.store = store
        self.training = training
        self.paths = paths
        self.bootstrap = Bootstrap(len(results.trials))
        self.gains = {f: captured_gain(results, self.bootstrap, f) for f in results.prefixes}
        self.plots: list[Plot] = []

    def body(self) -> Html:
        sections = [
            ("verdict", "Verdict", verdict.verdict(self.results, self.bootstrap, self.gains)),
            ("weights", "Weights", self._weights()),
            ("returns", "Returns", self._returns()),
            ("actions", "Actions", self._actions()),
            ("confidence", "Confidence", confidence_section(self.results, self.bootstrap, self._figure)),
            ("dynamics", "Dynamics or the average?", dynamics_section(self.results, self.bootstrap, self._figure)),
            ("paths", "Paths", self._paths()),
            ("runs", "Runs", self._runs()),
            ("reading", "How to read this", reading(self.results)),
            ("settings", "Settings", self._settings()),
        ]
        saw = "was trained on" if self.results.in_sample else "never saw"
        header = element(
            "header",
            element("h1", f"Forecasting PPO's weights on {self.results.env_id}"),
            element("p", f"How well a causal Transformer continues policy paths that it {saw}.", cls="sub"),
            self._facts(),
        )
        links = (Html(f'<a href="#{anchor}">{title}</a>') for anchor, title, _ in sections)
        main = element("main", *(page.section(*content) for content in sections))
        footer = f"Made by tipl {self.results.tipl_version}. Each figure also lies beside this page as a PNG file."
        body = page.join(header, element("nav", element("div", *links)), main, element("footer", footer))
        return Html(self._judged(body))

    def _judged(self, text: str) -> str:
        """Return `text` without the claim that trials were held out, where they were not."""
        return re.sub("held[- ]out", "judged", text) if self.results.in_sample else text

    def _figure(self, plot: Plot, caption: str) -> Html:
        legend = (dataclasses.replace(mark, label=self._judged(mark.label)) for mark in plot.legend)
        plot = dataclasses.replace(plot, legend=tuple(legend))
        self.plots.append(plot)
        return page.figure(plot, caption)

    # ------------------------------------------------------------------------------------------- what was run

    def _facts(self) -> Html:
        results, settings, store = self.results, self.results.settings, self.store
        trial = store.trial(results.trials[0])
        trials = f"{store.num_trials}, of which {len(results.trials)} held out"
        if results.is_fresh:
            taught = len(settings["train_trials"]) + len(settings["validation_trials"])
            trials = f"{len(results.trials)} held out, beside {taught} that taught"
        items = [
            ("Environment", results.env_id),
            ("Trials (PPO runs)", trials),
            ("Path of a trial", f"{trial.num_checkpoints} checkpoints, {int(trial.env_steps[-1]):,} env steps"),
            ("Policy", f"{store.policy.num_params:,} weights"),
        ]
        if self.training is not None:
            items.append(("Forecaster", f"{self.training.num_parameters:,} parameters"))
        if "num_episodes" in settings:
            items.append(("A return is the mean of", f"{settings['num_episodes']} episodes, each trial's own"))
        seconds = {stage: value for stage, value in results.seconds.items() if _is_number(value)}
        if self.training is not None and not math.isnan(self.training.seconds):
            seconds.setdefault("train", self.training.seconds)
        order = ["collect", "train", "rollout", "evaluate"]
        stages = sorted(seconds, key=lambda stage: order.index(stage) if stage in order else len(order))
        if stages:
            items.append(("Time", ", ".join(f"{stage} {fmt_seconds(seconds[stage])}" for stage in stages)))
        if results.machine:
            items.append(("Machine", _machine_words(results.machine)))
        return page.facts(items)

    # ------------------------------------------------------------------------------------------- weights

    def _weights(self) -> Html:
        names = [n for n in self.results.names if n != "return_floor"]  # the true policy has no weight error
        caption = (
            "Relative weight error at the end of the path, so many checkpoints ahead of the prefix's end: mean over "
            "held-out trials, 95 % interval below it; the best predictor is marked. A value of 1 is as wrong as the "
            "initial weights."
        )
        plot = plots.error_plot(
            "wpe", self.results, self.bootstrap, "wpe_relative", "relative weight error", BASIS_FLOORS
        )
        figure = self._figure(
            plot,
            "Relative weight error against the horizon: means over held-out trials, 95 % bands for TIPL, persistence "
            "and the floor. No forecast in the basis can go below the dashed floor.",
        )
        raw = self._error_table("Mean squared error over the policy's weights at the end of the path.", "wpe", names)
        details = element("details", element("summary", "Mean squared weight error (WPE)"), raw)
        return page.join(self._error_table(caption, "wpe_relative", names), figure, self._ranking(), details)

    def _ranking(self) -> Html:
        """Return the predictors in the order of their mean error over all prefixes."""
        found = standings(self.results, self.bootstrap, "wpe_relative")
        rows = [
            [
                element("th", f"{place}. {predictor_info(it.name).label}"),
                page.estimate_cell(fmt(it.error.value), fmt_interval(it.error)),
                page.estimate_cell(fmt(it.rank.value), fmt_interval(it.rank)),
            ]
            for place, it in enumerate(found, 1)
        ]
        caption = (
            "The predictors in the order of their relative weight error at the end of the path, mean over prefixes and "
            "held-out trials; and the mean rank over every trial and prefix, 1 the best: it tells whether a few trials "
            "make the order."
        )
        return page.join(
            element("h3", "Ranking"),
            page.table(caption, [element("th", name) for name in ("predictor", "relative error", "mean rank")], rows),
        )

    def _error_table(self, caption: str, measure: str, names: Sequence[str], statistic: Statistic = "mean") -> Html:
        return error_table(self.results, self.bootstrap, caption, measure, names, statistic)

    # ------------------------------------------------------------------------------------------- returns

    def _returns(self) -> Html:
        results = self.results
        if not any(results.has_values("return_predicted", name) for name in results.names):
            return element("p", "These results hold no returns.")
        caption = (
            "REPW at the end of the path, the absolute difference in mean episodic return between the forecast and the "
            "true policy: mean over held-out trials, 95 % interval below it; the best predictor is marked."
        )
        floors = [*BASIS_FLOORS, "return_floor"]
        parts = [
            element("h3", "Return error"),
            self._error_table(caption, "repw", results.names),
            self._figure(
                plots.error_plot("repw", results, self.bootstrap, "repw", "return error (REPW)", floors),
                "Return error against the horizon: means over held-out trials, 95 % bands for TIPL, persistence and "
                "the floors. Below the dotted line a difference comes from the episodes, not from the policy.",
            ),
        ]
        if any(gain.is_measured for gain in self.gains.values()):
            parts += [
                element("h3", "Share of the future gain"),
                self._gain_table(),
                *self._gain_shares(),
                self._figure(
                    plots.gain_plot(results, self.bootstrap),
                    "Return gained over the policy at the prefix's end (persistence, zero by definition) by the true "
                    "future and by each forecast: means over held-out trials, 95 % bands for the truth and TIPL. "
                    "Between the dotted lines lies the return noise.",
                ),
            ]
        parts += [
            element("h3", "Returns, true against forecast"),
            self._figure(
                plots.returns_plot(results),
                "Return of each forecast policy against the true policy's at the same checkpoint. Large marks: the end "
                "of the path; small marks: nearer horizons. On the diagonal the forecast is as good as the truth.",
            ),
        ]
        return page.join(*parts)

    def _gain_table(self) -> Html:
        names = [n for n in self.results.names if n not in ("persistence", "return_floor")]
        rows = []
        for f, gain in self.gains.items():
            row = [element("th", percent(f)), page.estimate_cell(fmt(gain.future.value), fmt_interval(gain.future))]
            if not gain.shares:
                row.append(Html(f'<td colspan="{len(names)}" class="quiet">{page.escape(verdict.no_gain(gain))}</td>'))
            else:
                best = leaders(gain.ranking)
                for n in names:
                    share = gain.shares.get(n, Estimate(math.nan))
                    row.append(predictor_cell(n, fmt_percent(share.value), fmt_interval(share, as_percent=True), best))
            rows.append(row)
        caption = (
            "Ratio of means at the end of the path: the return that the forecast gains over the prefix's end, divided "
            "by what the true future gains, each summed over held-out trials. Persistence captures nothing, by "
            "definition."
        )
        head = [element("th", "prefix"), element("th", "future gain"), *map(page.column_head, names)]
        return page.table(caption, head, rows)

    def _gain_shares(self) -> list[Html]:
        """Return the IQM of the trials' own shares: a table of the end of the path, a figure and a table of it all."""
        results = self.results
        every = {
            f: [captured_gain(results, self.bootstrap, f, horizon) for horizon in results.horizons[f].tolist()]
            for f in results.prefixes
        }
        if not any(gain.iqm_shares for gains in every.values() for gain in gains):
            return []
        ends = [(f, int(results.horizons[f][-1]), gain) for f, gain in self.gains.items()]
        each = [
            (f, horizon, gain)
            for f in results.prefixes
            for horizon, gain in zip(results.horizons[f].tolist(), every[f], strict=True)
        ]
        caption = (
            "Interquartile mean (IQM) at the end of the path: every trial's own share of its own gain, where that gain "
            "exceeds the return noise; the mean of the middle half of these trials, so that none outweighs the others."
        )
        details = element(
            "details",
            element("summary", "Share of the future gain (IQM) at every horizon"),
            self._share_table("The same at every horizon.", each),
        )
        figure = self._figure(
            plots.gain_share_plot(results, every),
            "Share of the future gain (IQM) against the horizon: 0 is the policy at the prefix's end, 1 the true "
            "future; 95 % band for TIPL.",
        )
        return [self._share_table(caption, ends), figure, details]

    def _share_table(self, caption: str, gains: Sequence[tuple[float, int, Gain]]) -> Html:
        """Return the IQMs, a row a (prefix, horizon) and a column a predictor."""
        names = [n for n in self.results.names if n not in ("persistence", "return_floor")]
        rows = []
        for f, horizon, gain in gains:
            best = leaders(gain.iqm_ranking)
            row = [element("th", percent(f), element("small", f"{horizon} ahead"))]
            row.append(element("td", f"{gain.num_gained} of {len(self.results.trials)}"))
            for n in names:
                share = gain.iqm_shares.get(n, Estimate(math.nan))
                row.append(predictor_cell(n, fmt_percent(share.value), fmt_interval(share, as_percent=True), best))
            rows.append(row)
        head = [element("th", "prefix"), element("th", "trials that gain"), *map(page.column_head, names)]
        return page.table(caption, head, rows)

    # ------------------------------------------------------------------------------------------- actions

    def _actions(self) -> Html:
        results = self.results
        names = [n for n in results.names if n != "return_floor"]  # the true policy acts as the true policy does
        parts = []
        if any(results.has_values("action_difference", n) for n in names):
            details = page.join(
                self._error_table("Action difference at the end of the path.", "action_difference", names),
                self._error_table("KL divergence at the end of the path (IQM), in nats.", "kl", names, "iqm"),
            )
            parts += [
                element("h3", "Action difference"),
                self._figure(
                    plots.error_plot(
                        "action_difference", results, self.bootstrap, "action_difference", "action difference",
                        BASIS_FLOORS,
                    ),
                    "Root mean square difference between the actions of the forecast and of the true policy on states "
                    "that the true policy visits, in units of half the action range: means over held-out "
                    "trials, 95 % bands for TIPL, persistence and the floor.",
                ),
                element("h3", "KL divergence"),
                self._figure(
                    plots.error_plot(
                        "kl", results, self.bootstrap, "kl", "KL divergence (nats)", BASIS_FLOORS,
                        statistic="iqm", is_log=True,
                    ),
                    "KL divergence of the forecast from the true policy, both stochastic as in training, on the same "
                    "states: interquartile means over held-out trials, for one forecast that is too sure of itself can "
                    "outweigh all others; 95 % bands for TIPL, persistence and the floor.",
                ),
                element("details", element("summary", "At the end of the path"), details),
            ]  # fmt: skip
        return page.join(*parts) if parts else element("p", "These results hold no comparison of actions.")

    # ------------------------------------------------------------------------------------------- paths and runs

    def _paths(self) -> Html:
        parts = [element("h3", "Coordinates")]
        trials = sorted({path.trial for path in self.paths})[:COORDINATE_TRIALS]
        if trials:
            parts.append(
                self._figure(
                    run_plots.coordinates_plot([path for path in self.paths if path.trial in trials]),
                    f"The first {run_plots.COORDINATES_SHOWN} coordinates, numbered at the right, of held-out paths "
                    "in the basis of each prefix: the truth, and TIPL's forecast from the prefix's end (vertical "
                    "line) on.",
                )
            )
        else:
            parts.append(element("p", "The evaluation left no coordinates of held-out paths."))
        spectra = [path_spectrum(self.store.trial(i)).singular_values for i in self.results.trials]
        spectra = [singular_values for singular_values in spectra if len(singular_values) > 2]
        if spectra:
            k = self.results.settings.get("n_components")
            parts.append(element("h3", "Singular spectrum"))
            parts.append(
                self._figure(
                    run_plots.spectrum_plot(spectra, k if isinstance(k, int) else None),
                    "Singular values of whole held-out paths, θₜ \N{MINUS SIGN} θ₀, and the relative error that the "
                    "best k directions of each path leave. A forecast has only the directions of its prefix: see the "
                    "basis floor. k: the number of coordinates that the forecaster works in.",
                )
            )
        return page.join(*parts)

    def _runs(self) -> Html:
        trials = [self.store.trial(i) for i in range(self.store.num_trials)]
        longest = max(trials, key=lambda trial: trial.num_checkpoints)
        returns = np.full((len(trials), longest.num_checkpoints), np.nan)
        for i, trial in enumerate(trials):
            returns[i, : trial.num_checkpoints] = trial.episodic_return
        figures = []
        if np.isfinite(returns).any():
            is_heldout = np.isin(np.arange(len(trials)), self.results.settings["heldout_trials"])
            bootstrap = Bootstrap(len(trials), num_resamples=2000)
            drawn = f", {run_plots.MAX_CURVES} of each kind drawn" if len(trials) > run_plots.MAX_CURVES else ""
            figures.append(
                self._figure(
                    run_plots.learning_plot(longest.env_steps, returns, is_heldout, self.results.prefixes, bootstrap),
                    f"Return of PPO's stochastic policy while it learns, {len(trials)} trials{drawn}: mean and its "
                    "95 % interval. Dotted: the ends of the prefixes.",
                )
            )
        if self.training is not None and len(self.training.steps):
            figures.append(
                self._figure(
                    run_plots.training_plot(self.training),
                    "The forecaster's relative error in training (first of one-step predictions, then of whole "
                    "rollouts), and its relative weight error at the end of validation trials' paths. The weights of "
                    "the best validation are kept"
                    + ("." if self.results.in_sample else "; held-out trials take no part."),
                )
            )
        if not figures:
            return element("p", "No episode ended in any trial, and no training curve was given.")
        return element("div", *figures, cls="pair")

    # ------------------------------------------------------------------------------------------- settings

    def _settings(self) -> Html:
        groups: dict[str, Mapping[str, Any]] = {
            "Evaluation": {
                name: value for name, value in self.results.settings.items() if not isinstance(value, Mapping)
            }
        }
        groups |= {name: value for name, value in self.results.settings.items() if isinstance(value, Mapping)}
        groups.setdefault("collect", self.store.config)
        groups |= {"machine": self.results.machine, "seconds": self.results.seconds}
        return page.join(*(_pairs(name.capitalize(), mapping) for name, mapping in groups.items() if mapping))


def _pairs(title: str, mapping: Mapping[str, Any]) -> Html:
    """Return names and values behind a line to open."""
    rows = (element("tr", element("th", name), element("td", _short(value))) for name, value in _flat(mapping))
    table = Html(f'<table class="pairs">{element("tbody", *rows)}</table>')
    return element("details", element("summary", title), element("div", table, cls="scroll"))


def _flat(mapping: Mapping[str, Any], parent: str = "") -> list[tuple[str, Any]]:
    """Return nested settings as dotted names."""
    items: list[tuple[str, Any]] = []
    for name, value in mapping.items():
        items += _flat(value, f"{parent}{name}.") if isinstance(value, Mapping) else [(f"{parent}{name}", value)]
    return items


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:280]} …"


def _machine_words(machine: Mapping[str, Any]) -> str:
    """Return a machine in a few words: texts as they are, counts with their name."""
    words = []
    for name, value in machine.items():
        if isinstance(value, str):
            words.append(value)
        elif _is_number(value):
            words.append(f"{value:g}{NBSP}{name.removeprefix('num_').replace('_', NBSP)}")
    return ", ".join(words[:3])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
