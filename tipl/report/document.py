"""One self-contained HTML page about an evaluation: what was run, what came out, and how reliable that is.

Reads `results.json` and `coordinates.safetensors` from `evaluate`, the store from `collect`, the loss curves from
`train`. This module writes the report and puts its sections together. Longer sections have modules of their own:
`verdict`, `returns`, `confidence`, `memorisation`, `paths_section` and `glossary`. Below these, `intervals` computes
means and their intervals, `plots` and `run_plots` the figures, `forecast_plot` the forecasts in two dimensions, `paths`
the spectra of paths; `page` makes the HTML, `drawing` the pictures.
"""

import base64
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tipl.files.locations import read_file, write_atomically
from tipl.files.manifest import NAME as MANIFEST
from tipl.files.manifest import check_folder, write_manifest
from tipl.files.publishing import check_output, claimed, published, remove, remove_dead_claim
from tipl.report import page, plots, run_plots, verdict
from tipl.report.confidence import confidence_section
from tipl.report.drawing import NBSP, Plot
from tipl.report.glossary import reading
from tipl.report.intervals import (
    Bootstrap,
    Statistic,
    captured_gain,
    standings,
)
from tipl.report.memorisation import dynamics_section
from tipl.report.page import Html, element, fmt, fmt_interval, fmt_seconds
from tipl.report.paths_section import paths_section
from tipl.report.predictor_info import BASIS_FLOORS, predictor_info
from tipl.report.results import CoordinatePath, Results, Training, read_coordinates, read_results, read_training
from tipl.report.returns import returns_section
from tipl.report.tables import error_table
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
    "plane",
    "coordinates",
    "spectrum",
    "learning_curves",
    "training",
)


MAX_VIDEO_BYTES = 2**25
"""Of all videos in a page, which holds them as text a third longer."""


def write_report(
    output: Path,
    *,
    evaluation: Path,
    store: Store,
    training: Path | None = None,
    videos: Sequence[Path] = (),
    overwrite: bool = False,
) -> Path:
    """Write `report.html` and its figures as PNG files into the folder `output`; return the path of the page.

    `evaluation` is the folder that `tipl evaluate` wrote, `store` holds the trials that it judged, `training` is the
    model's file `training.json`, `videos` are .mp4 files of `tipl video` that the page shows. Writing begins once the
    whole report has been made, and the page is written last.

    Raises FileExistsError where `output` is not an empty folder and `overwrite` is not set, FileNotFoundError where
    results or videos are missing, RuntimeError where a file is damaged, ValueError where the results are not about this
    store, or a video is no .mp4 file or too long for a page.
    """
    output, evaluation = Path(output), Path(evaluation)
    check_output(output, "write_report")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"write_report: output must be a folder, but {output} is a file")
    if output.exists() and any(output.iterdir()) and not overwrite:
        remove_dead_claim(output)
        raise FileExistsError(
            f"write_report: {output} exists and is not empty; choose another folder, or overwrite it (--overwrite)"
        )

    results = read_results(evaluation / "results.json")
    check_folder(evaluation)
    _check_store(results, store)
    losses = read_training(Path(training)) if training is not None else None
    coordinates = evaluation / "coordinates.safetensors"
    paths = read_coordinates(coordinates) if coordinates.exists() else []

    report = _Report(results, store, losses, paths, _read_videos(videos))
    body = report.body()  # fills report.plots
    files = {f"{plot.name}.png": plot.png() for plot in report.plots}
    html = page.document(f"tipl: {results.env_id}", body)
    if output.exists() and not any(output.iterdir()):
        output.rmdir()
    if not overwrite or not output.exists():
        with published(output, "report") as aside:
            _write_files(aside, files, html)
        return output / "report.html"
    with claimed(output, "report"):
        remove(output / MANIFEST)  # a manifest must never list files that are not there yet
        _write_files(output, files, html)
        for name in {f"{name}.png" for name in FIGURES} - files.keys():
            remove(output / name)  # left by an earlier report that had this figure
        write_manifest(output)
    return output / "report.html"


def _read_videos(paths: Sequence[Path]) -> dict[str, bytes]:
    """Return what the files of videos hold, by their names."""
    read: dict[str, bytes] = {}
    for path in map(Path, paths):
        read[path.name] = read_file(path, max_bytes=MAX_VIDEO_BYTES)
        if read[path.name][4:8] != b"ftyp":
            raise ValueError(f"write_report: videos must be .mp4 files, and {path} is none")
    if (size := sum(map(len, read.values()))) > MAX_VIDEO_BYTES:
        raise ValueError(f"write_report: the videos have {size:,} bytes, and a page has at most {MAX_VIDEO_BYTES:,}")
    return read


def _write_files(folder: Path, figures: Mapping[str, bytes], html: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in figures.items():
        write_atomically(folder / name, data)
    write_atomically(folder / "report.html", html)


def _check_store(results: Results, store: Store) -> None:
    if store.env_id != results.env_id:
        raise ValueError(f"write_report: {results.path} is of env_id {results.env_id!r}, the store of {store.env_id!r}")
    if (judged_with := results.settings.get("env_kwargs", store.env_kwargs)) != store.env_kwargs:
        raise ValueError(
            f"write_report: {results.path} is of env_kwargs {judged_with!r:.80}, the store of {store.env_kwargs!r:.80}"
        )
    if max(results.trials) >= store.num_trials:
        raise ValueError(
            f"write_report: {results.path} judges trial {max(results.trials)}, the store has {store.num_trials} trials"
        )


class _Report:
    """Builds the page from top to bottom, and collects its figures in `plots`."""

    def __init__(
        self,
        results: Results,
        store: Store,
        training: Training | None,
        paths: Sequence[CoordinatePath],
        videos: Mapping[str, bytes],
    ) -> None:
        self.results = results
        self.store = store
        self.training = training
        self.paths = paths
        self.videos = videos
        self.bootstrap = Bootstrap(len(results.trials))
        self.gains = {f: captured_gain(results, self.bootstrap, f) for f in results.prefixes}
        self.plots: list[Plot] = []

    def body(self) -> Html:
        sections = [
            ("verdict", "Verdict", verdict.verdict(self.results, self.bootstrap, self.gains)),
            ("weights", "Weights", self._weights()),
            ("returns", "Returns", returns_section(self.results, self.bootstrap, self.gains, self._figure)),
            *([("videos", "Videos", self._videos())] if self.videos else []),
            ("actions", "Actions", self._actions()),
            ("confidence", "Confidence", confidence_section(self.results, self.bootstrap, self._figure)),
            ("dynamics", "Dynamics or the average?", dynamics_section(self.results, self.bootstrap, self._figure)),
            ("paths", "Paths", paths_section(self.results, self.store, self.paths, self._figure)),
            ("runs", "Runs", self._runs()),
            ("reading", "How to read this", reading(self.results)),
            ("settings", "Settings", self._settings()),
        ]
        saw = "was trained on" if self.results.in_sample else "never saw"
        header = element(
            "header",
            element("h1", f"Forecasting PPO's weights on {self.results.env_id}"),
            element("p", f"How well a causal Transformer continues paths of policy weights that it {saw}.", cls="sub"),
            self._facts(),
        )
        links = (Html(f'<a href="#{anchor}">{title}</a>') for anchor, title, _ in sections)
        main = element("main", *(page.section(*content) for content in sections))
        footer = f"Made by tipl {self.results.tipl_version}. Each figure is also a PNG file in the folder of this page."
        body = page.join(header, element("nav", element("div", *links)), main, element("footer", footer))
        return Html(self._judged(body))

    def _judged(self, text: str) -> str:
        """Return `text` with "judged" for "held out" where no trial was held out."""
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
            trials = f"{len(results.trials)} held out, and {taught} for training and validation"
        items = [
            ("Environment", store.env),
            ("Trials (PPO runs)", trials),
            ("Path of a trial", f"{trial.num_checkpoints} checkpoints, {int(trial.env_steps[-1]):,} env steps"),
            ("Policy", f"{store.policy.num_params:,} weights"),
        ]
        if self.training is not None:
            items.append(("Forecaster", f"{self.training.num_parameters:,} parameters"))
        if "num_episodes" in settings:
            items.append(
                ("A return is the mean of", f"{settings['num_episodes']} episodes, other seeds for each trial")
            )
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
            "Relative weight error at the end of the path, the given number of checkpoints ahead of the prefix's end. "
            "Mean over held-out trials, with its 95 % interval below; the best predictor is marked. A value of 1 is as "
            "wrong as the initial weights."
        )
        plot = plots.error_plot(
            "wpe", self.results, self.bootstrap, "wpe_relative", "relative weight error", BASIS_FLOORS
        )
        figure = self._figure(
            plot,
            "Relative weight error against the horizon: means over held-out trials, with 95 % bands for TIPL, "
            "persistence and the floor. No forecast within the basis can go below the dashed floor.",
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
            "The predictors ordered by their relative weight error at the end of the path, mean over prefixes and "
            "held-out trials; and their mean rank over all trials and prefixes, where 1 is the best. Where the two "
            "orders differ, a few trials decide the mean error."
        )
        return page.join(
            element("h3", "Ranking"),
            page.table(caption, [element("th", name) for name in ("predictor", "relative error", "mean rank")], rows),
        )

    def _error_table(self, caption: str, measure: str, names: Sequence[str], statistic: Statistic = "mean") -> Html:
        return error_table(self.results, self.bootstrap, caption, measure, names, statistic)

    # ------------------------------------------------------------------------------------------- actions

    def _actions(self) -> Html:
        results = self.results
        names = [n for n in results.names if n != "return_floor"]  # the true policy acts as the true policy does
        if not any(results.has_values("action_difference", n) for n in names):
            return element("p", "These results hold no comparison of actions.")
        tables = [self._error_table("Action difference at the end of the path.", "action_difference", names)]
        plot = plots.error_plot(
            "action_difference", results, self.bootstrap, "action_difference", "action difference", BASIS_FLOORS
        )
        parts = [
            element("h3", "Action difference"),
            self._figure(
                plot,
                "Root mean square difference between the actions of the forecast and of the true policy on states that "
                "the true policy visits, in units of half the action range, or the share of these states in which "
                "discrete actions differ: means over held-out trials, with 95 % bands for TIPL, persistence and the "
                "floor.",
            ),
        ]
        if any(results.has_values("kl", n) for n in names):  # not of TD3's and DQN's policies, nor with gSDE
            tables.append(self._error_table("KL divergence at the end of the path (IQM), in nats.", "kl", names, "iqm"))
            plot = plots.error_plot(
                "kl", results, self.bootstrap, "kl", "KL divergence (nats)", BASIS_FLOORS, statistic="iqm", is_log=True
            )
            parts += [
                element("h3", "KL divergence"),
                self._figure(
                    plot,
                    "KL divergence of the forecast from the true policy, both stochastic as in training, on the same "
                    "states: interquartile means over held-out trials, because a single forecast with a very small "
                    "standard deviation can outweigh all others; with 95 % bands for TIPL, persistence and the floor.",
                ),
            ]
        return page.join(*parts, element("details", element("summary", "At the end of the path"), page.join(*tables)))

    # ------------------------------------------------------------------------------------------- videos

    def _videos(self) -> Html:
        figures = (
            Html(
                f'<figure><video controls loop muted playsinline src="data:video/mp4;base64,'
                f'{base64.b64encode(content).decode()}"></video>{element("figcaption", name)}</figure>'
            )
            for name, content in self.videos.items()
        )
        words = element(
            "p", "Policies side by side, from the same start, filmed by ", element("code", "tipl video"), "."
        )
        return page.join(words, *figures)

    # ------------------------------------------------------------------------------------------- runs

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
                    f"Return of PPO's stochastic policy while it learns, {len(trials)} trials{drawn}: mean with its "
                    "95 % interval. Dotted: the ends of the prefixes.",
                )
            )
        if self.training is not None and len(self.training.steps):
            figures.append(
                self._figure(
                    run_plots.training_plot(self.training),
                    "The forecaster's relative error in training (first of one-step predictions, then of whole "
                    "rollouts), and its relative weight error at the end of the validation trials' paths. The weights "
                    "with the smallest validation error are kept"
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
    """Return a collapsed table of names and values."""
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
    """Return a short description of a machine: texts as they are, counts with their names."""
    words = []
    for name, value in machine.items():
        if isinstance(value, str):
            words.append(value)
        elif _is_number(value):
            words.append(f"{value:g}{NBSP}{name.removeprefix('num_').replace('_', NBSP)}")
    return ", ".join(words[:3])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
