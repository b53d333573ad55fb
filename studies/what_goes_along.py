"""Why do runs learn more slowly after a jump that holds? One change of the jump at a time, on the same seeds.

    python studies/what_goes_along.py --model runs/faster/annealed --output runs/what_goes_along

On InvertedDoublePendulum-v5, with PPO's best settings of studies/train_faster.json ("PPO, tuned further") and the jump
that was chosen on top of them, it trains runs without jumps, with this jump, and with it changed in one thing: log_std
or the critic stays, Adam's moments start anew, or the jump is shorter. Seeds are those of neither tuning nor the final
runs. Writes a ledger for each arm into OUTPUT and prints the paired differences, with 95 % bootstrap intervals; what is
there is not computed again.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import train_faster
from study import command_line, interval

from tipl.forecasting.forecaster import Forecaster
from tipl.jumping.jump_config import JumpConfig
from tipl.jumping.jumps import Jumps
from tipl.jumping.learner import PopulationLearner, Singles
from tipl.jumping.ledger import Ledger
from tipl.report.comparison import compare
from tipl.report.intervals import Bootstrap, Estimate

TASK, SEED, RUNS = "InvertedDoublePendulum-v5", 424242, 16
RESET = "reset_moments"
CHANGES: dict[str, dict[str, Any]] = {
    "the jump as chosen": {},
    "log_std stays": {"log_std_drop": 0.0},
    "the critic stays": {"critic": False},
    "Adam's moments anew": {RESET: True},
    "log_std stays, moments anew": {"log_std_drop": 0.0, RESET: True},
    "reach 3": {"reach": 3.0},
    "reach 1": {"reach": 1.0},
}
"""Arm -> what differs from the chosen jump."""


class MomentsAnew(PopulationLearner):
    """A population's trials, whose optimiser starts anew where weights are replaced."""

    def replace(self, run: int, weights: Singles) -> None:
        super().replace(run, weights)
        self.population.moments[:, run] = 0.0
        self.population.num_updates[run] = 0


def jumps_of(learner: PopulationLearner, forecaster: Forecaster, config: JumpConfig, anew: bool) -> Jumps:
    return Jumps.by_forecasts(MomentsAnew(learner.population) if anew else learner, forecaster, config)


def shown(it: Estimate) -> str:
    return interval(it.value, it.low, it.high, digits=0)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a forecaster of annealed runs of the task")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the ledgers")
    arguments = parser.parse_args()
    given = json.loads(train_faster.SETTINGS.read_text())[TASK]
    given |= {"tuning_seed": SEED, "tuning_runs": RUNS}
    chosen = given["chosen"]["TIPL on PPO, tuned further"]
    config = {it.name: chosen[it.name] for it in dataclasses.fields(JumpConfig) if it.name in chosen}
    forecaster = Forecaster.load(arguments.model)
    arguments.output.mkdir(parents=True, exist_ok=True)
    ledgers = {}
    for arm, change in {"no jump": None, **CHANGES}.items():
        path = arguments.output / f"{arm.replace(' ', '_')}.json"
        if not path.exists():
            moves = Jumps.none
            if change is not None:
                changed = JumpConfig(**config | {name: it for name, it in change.items() if name != RESET})
                moves = functools.partial(jumps_of, forecaster=forecaster, config=changed, anew=RESET in change)
            train_faster.train(TASK, given, chosen["ppo"], moves, final=False).save(path)
            print(f"{arm}: trained", flush=True)
        ledgers[arm] = Ledger.load(path)
    areas = {arm: ledger.curves().mean(1) for arm, ledger in ledgers.items()}
    for arm, found in compare(ledgers, "no jump").items():
        more = Bootstrap(RUNS).estimate(areas[arm] - areas["no jump"])
        held = [jump.held for jump in ledgers[arm].jumps]
        print(
            f"{arm:28} mean return {found.mean_return:5.0f}, {shown(more)} more; final return "
            f"{found.final_return:5.0f}, {shown(found.gain)} more; "
            f"jumps {held.count(True)} held, {held.count(False)} undone"
        )


if __name__ == "__main__":
    main()
