"""Does a run that jumps along forecasts train faster than plain PPO, and than its best rivals?

    python studies/train_faster.py tune InvertedPendulum-v5 --model runs/faster/model --output runs/train_faster
    python studies/train_faster.py final InvertedPendulum-v5 --model runs/faster/model --output runs/train_faster
    python studies/train_faster.py results --output runs/train_faster

`studies/train_faster.json` fixes for each experiment the task (the experiment's name where it has no "task"), the
seeds, the settings that each arm tries and, after `tune`, those that it chose. `tune` tries the settings of each arm,
equally many of every arm that is tuned, on the same tuning seeds (those "on" another arm begin with what it chose) and
chooses the largest mean return over all iterations; an only setting is chosen without a trial. An arm that names a
"forecaster" takes that of `--model NAME=FOLDER`; one that is "zero-shot" never saw the task, and its arm is not tuned.
`final` trains the chosen ones on fresh seeds, paired, and writes a ledger for each arm. `results` makes
docs/results/train_faster.json and docs/figures/train_faster_<experiment>.svg of the ledgers; rows and figures of
experiments without ledgers stay. What is there is not computed again.

Returns are those of training, with noise on the actions, of every iteration that the run paid for, undone ones too. The
target is plain PPO's mean return over its last 5 iterations. A ratio to plain is the part of plain PPO's env steps
after which an arm's mean return reaches that. All intervals are paired bootstraps over seeds.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from study import command_line, write_record

from tipl.collecting.collection import trial_seeds
from tipl.collecting.envs import make_vec
from tipl.collecting.population import environment_seeds
from tipl.collecting.ppo_config import PPOConfig
from tipl.files.locations import write_atomically
from tipl.forecasting.forecaster import Forecaster
from tipl.forecasting.transformer import TrajectoryTransformer
from tipl.jumping.jump_config import JumpConfig
from tipl.jumping.jumping_population import JumpingPopulation
from tipl.jumping.jumps import Jumps
from tipl.jumping.learner import Learner
from tipl.jumping.ledger import Ledger
from tipl.jumping.rivals import OuterSteps, averaging, linear_regrounding, rank_one
from tipl.report.comparison import compare, ledger_plot, ratios_of_steps
from tipl.report.intervals import Estimate

ROOT = Path(__file__).parents[1]
SETTINGS = Path(__file__).with_suffix(".json")
RESULTS, FIGURES = ROOT / "docs/results/train_faster.json", ROOT / "docs/figures"
Setting = dict[str, Any]
"""{"ppo": {...}} and, for what moves weights, {"move": name, ...its arguments}."""
Models = dict[str, Path]
"""The folders of forecasters by name; "" for the one without a name."""


def random_forecaster(like: Forecaster) -> Forecaster:
    """Return a forecaster of the same shape with random weights: the negative control."""
    model = TrajectoryTransformer(like.model.config)
    for i, parameter in enumerate(model.parameters()):
        values = np.random.default_rng(i).normal(0.0, 0.1, parameter.shape).astype(np.float32)
        parameter.data.copy_(parameter.data.new_tensor(values))
    return Forecaster(model.eval(), config=like.config)


def movers(setting: Setting, forecaster: Forecaster | None) -> Callable[[Learner], Any]:
    """Return what makes the jumps, or what else moves weights, of a learner."""
    arguments = {name: value for name, value in setting.items() if name not in ("ppo", "move", "forecaster")}
    move = setting.get("move", "none")
    if move == "none":
        return Jumps.none
    if move in ("tipl", "random"):
        assert forecaster is not None
        chosen = random_forecaster(forecaster) if move == "random" else forecaster
        return functools.partial(Jumps.by_forecasts, forecaster=chosen, config=JumpConfig(**arguments))
    rivals: dict[str, Callable[..., Any]] = {
        "outer": OuterSteps,
        "linear": linear_regrounding,
        "rank1": rank_one,
        "average": averaging,
    }
    return functools.partial(rivals[move], **arguments)


def train(
    experiment: str, given: dict[str, Any], ppo_settings: dict[str, Any], moves: Callable[[Learner], Any], final: bool
) -> Ledger:
    """Return the ledger of one setting on the tuning seeds, or on the final ones; `moves` makes what moves weights."""
    seeds = trial_seeds(
        given["final_seed" if final else "tuning_seed"], given["final_runs" if final else "tuning_runs"]
    )
    shared = PPOConfig(**given["ppo"])
    ppo = dataclasses.replace(shared, **ppo_settings)
    task = given.get("task", experiment)
    env = make_vec(task, len(seeds) * ppo.num_envs, seeds=environment_seeds(seeds, ppo.num_envs), num_threads=None)
    iterations = given["iterations"] * shared.num_steps // ppo.num_steps  # as many env steps, whatever the arm
    population = JumpingPopulation(env, ppo, seeds, num_iterations=iterations, jumps=moves)
    for _ in range(iterations):
        population.iterate()
    env.close()
    return population.ledger


def ledger_of(
    experiment: str, arm: str, setting: Setting, given: dict[str, Any], models: Models, output: Path, *, final: bool
) -> Ledger:
    """Return the ledger of one setting of an arm, trained unless it is there."""
    digest = hashlib.sha256(json.dumps([setting, given["ppo"]], sort_keys=True).encode()).hexdigest()[:12]
    folder = output / experiment / ("final" if final else "tuning")
    # Another arm may have the same setting.
    path = next(folder.glob(f"*-{digest}.json"), folder / f"{arm}-{digest}.json")
    if not path.exists():
        needs = setting.get("move", "") in ("tipl", "random")
        name = setting.get("forecaster", "")
        model = models.get(name) if needs else None
        if needs and model is None:
            raise SystemExit(f"--model {name and f'{name}='}FOLDER is needed for {arm}")
        start = time.perf_counter()
        moves = movers(setting, Forecaster.load(model) if model else None)
        ledger = train(experiment, given, setting.get("ppo", {}), moves, final)
        path.parent.mkdir(parents=True, exist_ok=True)
        ledger.save(path)
        print(f"{experiment} {arm} {setting}: {time.perf_counter() - start:.0f} s", flush=True)
    return Ledger.load(path)


def area(ledger: Ledger) -> float:
    """Return the mean return over iterations and runs."""
    return float(np.nanmean(ledger.curves()))


def settings_of(grid: dict[str, Any]) -> list[Setting]:
    """Return all settings of an arm's grid; keys that begin with "ppo." are PPO's."""
    names, values = list(grid), [value if isinstance(value, list) else [value] for value in grid.values()]
    settings = []
    for chosen in itertools.product(*values):
        setting: Setting = {"ppo": {}}
        for name, value in zip(names, chosen, strict=True):
            if name.startswith("ppo."):
                setting["ppo"][name.removeprefix("ppo.")] = value
            else:
                setting[name] = value
        settings.append(setting)
    return settings


def tune(experiment: str, models: Models, output: Path, arms: list[str] | None) -> None:
    """Try every setting of all arms, or of some, on the tuning seeds, and write down what was chosen."""
    everything = json.loads(SETTINGS.read_text())
    given = everything[experiment]
    chosen, tried = given.setdefault("chosen", {}), given.setdefault("settings_tried", {})
    for arm in arms or given["arms"]:
        grid = given["arms"][arm]
        settings = settings_of(grid["grid"])
        if "on" in grid:
            settings = [{**it, "ppo": {**chosen[grid["on"]]["ppo"], **it["ppo"]}} for it in settings]
        best = 0
        if len(settings) > 1:
            areas = [area(ledger_of(experiment, arm, it, given, models, output, final=False)) for it in settings]
            best = int(np.argmax(areas))
            print(f"{experiment} {arm}: {areas[best]:.1f}, the best of {len(areas)} settings", flush=True)
        chosen[arm], tried[arm] = settings[best], len(settings)
        write_record(SETTINGS, everything, indent=1)


def final(experiment: str, models: Models, output: Path) -> None:
    """Train every arm as it was chosen on the final seeds."""
    given = json.loads(SETTINGS.read_text())[experiment]
    for arm, setting in given["chosen"].items():
        ledger_of(experiment, arm, setting, given, models, output, final=True)


def rows_of(experiment: str, given: dict[str, Any], ledgers: dict[str, Ledger]) -> list[dict[str, Any]]:
    """Return a row for each arm of an experiment. The best rival is the one that was quickest on these very seeds."""
    arms = compare(ledgers, "plain")
    rivals = [name for name in arms if not name.startswith(("TIPL", "plain", "random"))] or ["plain"]
    best = min(rivals, key=lambda name: (arms[name].steps.value, -arms[name].mean_return))
    to_best = ratios_of_steps(ledgers, "plain", best)
    rows = []
    for name, arm in arms.items():
        ledger = ledgers[name]
        held = [getattr(jump, "held", None) for jump in ledger.jumps]
        rows.append(
            {
                "experiment": experiment,
                "task": given.get("task", experiment),
                "setting": given["chosen"][name],
                "arm": name,
                "seeds": len(ledger.seeds),
                **_interval("ratio_to_plain", "ratio", arm.steps),
                "best_rival": best,
                **_interval("ratio_to_best_rival", "rival", to_best[name]),
                "final_return": round(arm.final_return, 2),
                **_interval("return_difference", "difference", arm.gain),
                "mean_return": round(arm.mean_return, 2),
                "probability_of_improvement": round(arm.improvement, 4),
                "settings_tried": given["settings_tried"][name],
                "env_steps": ledger.env_steps,
                "jumps_held": held.count(True),
                "jumps_undone": held.count(False),
            }
        )
    return rows


def _interval(name: str, short: str, estimate: Estimate) -> dict[str, float | None]:
    """Return an estimate and its bounds as entries of a row; null for "never"."""
    values = {name: estimate.value, f"{short}_low": estimate.low, f"{short}_high": estimate.high}
    return {key: round(value, 4) if math.isfinite(value) else None for key, value in values.items()}


def results(output: Path) -> None:
    """Write the rows of all experiments whose final ledgers are there, and their figures."""
    rows = []
    settings = json.loads(SETTINGS.read_text())
    all_arms = [arm for given in settings.values() for arm in given["arms"]]
    for experiment, given in settings.items():
        if not (output / experiment / "final").is_dir():
            rows += [row for row in json.loads(RESULTS.read_text())["rows"] if row["experiment"] == experiment]
            continue
        ledgers = {
            arm: ledger_of(experiment, arm, setting, given, {}, output, final=True)
            for arm, setting in given["chosen"].items()
        }
        rows += rows_of(experiment, given, ledgers)
        # An arm whose setting an earlier one has as well would hide its curve.
        first_with = {str(setting): arm for arm, setting in reversed(given["chosen"].items())}
        drawn = {arm: ledgers[arm] for arm in given["chosen"] if arm in first_with.values()}
        write_atomically(FIGURES / f"train_faster_{experiment}.svg", ledger_plot([drawn], all_arms).svg())
    write_record(RESULTS, {"rows": rows}, indent=1)
    for row in rows:
        print(
            f"{row['experiment']:22} {row['arm']:18} "
            f"{row['ratio_to_plain']} [{row['ratio_low']}, {row['ratio_high']}]  "
            f"to {row['best_rival']} {row['ratio_to_best_rival']} [{row['rival_low']}, {row['rival_high']}]  "
            f"final return {row['final_return']} ({row['return_difference']:+} [{row['difference_low']}, "
            f"{row['difference_high']}])  mean {row['mean_return']}  jumps {row['jumps_held']}/{row['jumps_undone']}"
        )


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("stage", choices=("tune", "final", "results"))
    parser.add_argument("experiment", nargs="?", help="one of those in train_faster.json")
    parser.add_argument(
        "--model", nargs="+", default=[], metavar="[NAME=]FOLDER", help="the forecaster, and those that arms name"
    )
    parser.add_argument("--arms", nargs="+", help="tune only these; the others keep what was chosen for them")
    parser.add_argument("--output", type=Path, required=True, help="the folder of all ledgers")
    arguments: argparse.Namespace = parser.parse_args()
    if arguments.stage == "results":
        results(arguments.output)
        return
    models = {name: Path(folder) for name, _, folder in (given.rpartition("=") for given in arguments.model)}
    known = list(json.loads(SETTINGS.read_text()))
    if arguments.experiment not in known:
        parser.error(f"experiment: must be one of {', '.join(known)}, got {arguments.experiment}")
    if arguments.stage == "tune":
        unknown = set(arguments.arms or ()) - set(json.loads(SETTINGS.read_text())[arguments.experiment]["arms"])
        if unknown:
            parser.error(f"--arms: {', '.join(sorted(unknown))} are not among the arms in {SETTINGS.name}")
        tune(arguments.experiment, models, arguments.output, arguments.arms)
    else:
        final(arguments.experiment, models, arguments.output)


if __name__ == "__main__":
    main()
