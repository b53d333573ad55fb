"""Jumps: a run's weights are replaced by a forecast of them, and put back where its own next iterations are worse.

Shapes  N runs that learn in lockstep; P weights of a run, the actor's p first; h+1 checkpoints of its path.

Between two iterations of training every run is in one of two states. While it *walks*, a schedule says whether to jump
now and how far. A jump saves all that the run's next iteration depends on, and sets the weights to the forecast. Then
the run is *tested*: it trains on as before, and the returns of each iteration's episodes are compared with what the
trend before the jump leads to expect. If they are higher, by more than chance, in each of the next few iterations, the
jump is kept and has cost nothing. If not, the run is put back to what it was before, and the env steps since then are
lost, and counted. No other episode is run to judge.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tipl.forecasting.forecaster import Forecaster
from tipl.judging.predictors import Predictor
from tipl.jumping.jump_config import MIN_ROWS, START, JumpConfig
from tipl.jumping.learner import Learner, Singles
from tipl.policy import Layout
from tipl.storing.store import UNKNOWN
from tipl.subspace.prefix import Prefix
from tipl.subspace.prefix_end import MIN_PREFIX_END

NOISE_WINDOW = 8
"""Iterations whose returns say how much the mean return of an iteration varies by chance."""


@dataclasses.dataclass(frozen=True)
class Jump:
    """One jump of one run."""

    run: int
    iteration: int
    """Iterations that the run had completed when it jumped."""
    ahead: int
    """Iterations ahead that the forecast was for."""
    held: bool | None = None
    """False where it was undone; None while it is tested."""
    lost: int = 0
    """Iterations that it cost, where it was undone."""


@dataclasses.dataclass
class Walk:
    """What is known of one run: all that a schedule may look at."""

    path: list[Singles]
    """Checkpoints (P,) of kept iterations, `every` apart; each doubling of `every` drops every other one. After a jump
    the last one is where the run jumped to."""
    every: int = 1
    iteration: int = 0
    """Iterations completed, those that were undone included."""
    kept_iterations: int = 0
    returns: list[float] = dataclasses.field(default_factory=list)
    """Mean return of the episodes of each kept iteration; NaN where none ended."""
    last_jump: int | None = None
    """`iteration` at the last jump, held or undone."""
    num_held: int = 0
    num_undone: int = 0
    due: int = 0
    """Iterations ahead to jump at the next checkpoint of the path; 0 for none."""

    @property
    def since_jump(self) -> int:
        """Iterations since the last jump, or since the run began."""
        return self.iteration - (self.last_jump or 0)

    def expected(self, ahead: int = 1) -> tuple[float, float]:
        """Return the mean return `ahead` iterations later, as the trend of the last four has it, and the deviation of
        one iteration's from the trend; NaN and infinity where too few are known."""
        known = np.array([value for value in self.returns if not math.isnan(value)])
        if len(known) < 2:
            return (float(known[-1]) if len(known) else math.nan), math.inf
        steps = np.diff(known[-NOISE_WINDOW:])
        noise = math.sqrt(float(np.mean((steps - steps.mean()) ** 2)) / 2)
        return float(known[-2:].mean() + (ahead + 0.5) * steps[-3:].mean()), noise

    def add(self, weights: Singles, value: float, max_rows: int) -> bool:
        """Add an iteration that was kept; return whether its weights are a checkpoint of the path."""
        self.kept_iterations += 1
        self.returns.append(value)
        if self.kept_iterations % self.every:
            return False
        self.path.append(weights)
        if len(self.path) > max_rows:
            self.path = self.path[::2]
            self.every *= 2
        return True

    def copy(self) -> "Walk":
        return dataclasses.replace(self, path=list(self.path), returns=list(self.returns))


@dataclasses.dataclass(frozen=True)
class Test:
    """A jump that is tested: what to go back to."""

    jump: int
    """Its index in `Jumps.jumps`."""
    kept: Any
    walk: Walk


class Schedule(Protocol):
    """When a run jumps, and how far."""

    def ahead(self, walk: Walk) -> int:
        """Return how many iterations ahead to jump now; 0 for not now."""
        ...


@dataclasses.dataclass(frozen=True)
class At:
    """Jumps after given iterations, each of the same length or of its own."""

    iterations: tuple[int, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) not in (1, len(self.iterations)) or min((*self.iterations, *self.lengths)) < 1:
            raise ValueError(
                f"At: lengths must be one or {len(self.iterations)} positive ints, one for each iteration, got "
                f"{self.lengths} for {self.iterations}"
            )

    def ahead(self, walk: Walk) -> int:
        if walk.iteration not in self.iterations:
            return 0
        return self.lengths[self.iterations.index(walk.iteration) if len(self.lengths) > 1 else 0]


@dataclasses.dataclass(frozen=True)
class Every:
    """A jump every `period` iterations, each of the same length: linear re-grounding's schedule (arXiv 2601.04537)."""

    period: int
    length: int

    def __post_init__(self) -> None:
        if min(self.period, self.length) < 1:
            raise ValueError(f"Every: period and length must be positive, got {self.period} and {self.length}")

    def ahead(self, walk: Walk) -> int:
        return 0 if walk.iteration % self.period else self.length


@dataclasses.dataclass(frozen=True)
class Growing:
    """Jumps as far as the run has walked since the last one, times `reach`; each doubles the wait for the next one."""

    config: JumpConfig

    def ahead(self, walk: Walk) -> int:
        config = self.config
        if walk.num_held >= config.max_jumps or walk.num_undone >= config.max_undone:
            return 0
        assert config.start is not None, "with_start"
        if walk.since_jump < config.start * 2 ** (walk.num_held + walk.num_undone):
            return 0
        return max(1, round(config.reach * walk.since_jump))


class Forecasts:
    """A forecaster as a predictor of one run's weights, for horizons as far as it knows paths."""

    def __init__(self, forecaster: Forecaster, layout: Layout) -> None:
        """Forecast weights of this layout. Raises ValueError where the forecaster cannot."""
        shared, longest = forecaster.shared_basis, forecaster.model.config.max_len
        if shared is not None:
            raise ValueError("it has a shared basis, which serves no run that it was not trained on")
        if longest <= MIN_ROWS:
            raise ValueError(f"it knows paths of {longest} checkpoints, and jumps need {MIN_ROWS + 1}")
        self.forecaster, self.layout = forecaster, layout

    def forecast(self, prefix: Prefix, horizons: NDArray[np.int64]) -> Singles:
        """Return the forecast weights (n, p) at `horizons` (n,) checkpoints after the prefix."""
        room = self.forecaster.model.config.max_len - len(prefix.weights)
        horizons = np.minimum(horizons, room)
        basis = prefix.basis(self.forecaster.model.config.n_components)
        made = self.forecaster.forecast(
            [prefix.weights], [int(horizons.max())], layout=self.layout, bases=[basis], num_threads=1
        )
        return made[0].weights(horizons)


class Jumps:
    """Watches runs from their first weights on and lets them jump."""

    def __init__(
        self,
        learner: Learner,
        schedule: Schedule,
        actor: Predictor | None,
        critic: Predictor | None = None,
        config: JumpConfig = JumpConfig(),
    ) -> None:
        """Watch `learner`, which has not learned yet.

        Args:
            actor, critic: what forecasts the first p weights of a run, and those behind them. Without a critic's, a
                jump leaves these as they are; without an actor's nothing ever jumps.
        """
        self.learner, self.schedule, self.actor, self.critic, self.config = learner, schedule, actor, critic, config
        self.walks = [Walk([weights]) for weights in learner.weights()]
        self.jumps: list[Jump] = []
        self.tests: dict[int, Test] = {}
        """By run."""
        self._log_std = np.concatenate(
            [
                np.arange(offset, offset + math.prod(shape))
                for name, (offset, shape) in learner.actor.layout.items()
                if name.endswith("log_std")
            ]
            or [np.empty(0, np.int64)]
        )

    @classmethod
    def none(cls, learner: Learner) -> "Jumps":
        """Return jumps that never happen: what watches a plain run."""
        return cls(learner, Growing(JumpConfig(max_jumps=0)), None)

    @classmethod
    def by_forecasts(
        cls, learner: Learner, forecaster: Forecaster, config: JumpConfig, env_id: str = UNKNOWN
    ) -> "Jumps":
        """Return jumps along a forecaster's forecasts; none, with a warning, where it does not fit the runs.

        `env_id` says which task the runs learn, for the default of `config.start`.
        """
        config = config.with_start(late=not forecaster.is_of_task(env_id, learner.actor))
        config = dataclasses.replace(config, max_rows=min(config.max_rows, rows_of(forecaster)))
        try:
            actor = Forecasts(forecaster, learner.actor)
            critic = Forecasts(forecaster, learner.critic) if config.critic and learner.critic is not None else None
        except ValueError as error:
            warnings.warn(f"no jumps: the forecaster does not fit: {error}", stacklevel=2)
            return cls(learner, Growing(config), None, None, config)
        return cls(learner, Growing(config), actor, critic, config)

    @property
    def first_jump(self) -> int:
        """Iterations before the first jump along a forecast."""
        return START if self.config.start is None else self.config.start

    def after_iteration(self, episodic_return: Sequence[float] | NDArray[np.float64], *, is_last: bool = False) -> None:
        """Judge, undo and make jumps; call this after each iteration's update.

        Args:
            episodic_return: mean return of each run's episodes that ended in this iteration, (N,); NaN where none did:
                a jump is then tested for another iteration. A run whose weights are not finite fails its test.
            is_last: training ends here: no jump is made, and one that no episode has tested is undone.
        """
        weights = self.learner.weights()
        finite = np.asarray(np.isfinite(weights).all(1))
        for run, value in enumerate(np.asarray(episodic_return, np.float64).tolist()):
            walk = self.walks[run]
            walk.iteration += 1
            if not finite[run]:
                value = -math.inf  # whatever its episodes returned
            if run in self.tests and (is_last or not math.isnan(value)) and self._judge(run, walk, value, is_last):
                continue
            if not finite[run]:
                continue
            is_checkpoint = walk.add(weights[run], value, self.config.max_rows)
            if run in self.tests or self.actor is None or is_last:
                continue
            walk.due = walk.due or self.schedule.ahead(walk)
            if walk.due and is_checkpoint and len(walk.path) > MIN_PREFIX_END:
                self._jump(run, walk)

    def _judge(self, run: int, walk: Walk, value: float, is_last: bool) -> bool:
        """Judge the jump of a run by an iteration after it, and undo it if need be; return whether it was undone.

        Where fewer than two iterations before the jump had episodes that ended, there is nothing to compare with, and
        it is undone.
        """
        test = self.tests[run]
        tested = 1 + sum(not math.isnan(it) for it in walk.returns[len(test.walk.returns) :])
        expected, noise = test.walk.expected(walk.iteration - test.walk.iteration)
        margin = self.config.margin
        held = value != -math.inf and (margin is None or value >= expected + margin * noise)  # False for NaN
        if held and tested < self.config.test_iterations and not is_last:
            return False
        del self.tests[run]
        jump = self.jumps[test.jump]
        lost = 0 if held else walk.iteration - jump.iteration
        self.jumps[test.jump] = dataclasses.replace(jump, held=held, lost=lost)
        walk.num_held += held
        walk.num_undone += not held
        if held:
            return False
        self.learner.put_back(run, test.kept)
        counts = ("iteration", "last_jump", "num_held", "num_undone")
        self.walks[run] = dataclasses.replace(test.walk, **{name: getattr(walk, name) for name in counts})
        return True

    def _jump(self, run: int, walk: Walk) -> None:
        """Set a run to its forecast `walk.due` iterations ahead, and begin to test it."""
        ahead, walk.due = walk.due, 0
        walk.last_jump = walk.iteration
        weights = self.forecast(walk, ahead)
        if not np.isfinite(weights).all():
            walk.num_undone += 1
            return
        self.tests[run] = Test(len(self.jumps), self.learner.keep(run), walk.copy())
        self.learner.replace(run, weights)
        walk.path[-1] = weights
        self.jumps.append(Jump(run, walk.iteration, ahead))

    def forecast(self, walk: Walk, ahead: int) -> Singles:
        """Return the weights (P,) that a run is to have after a jump of `ahead` iterations.

        A part that stands where it began, such as a critic that is not trained, has no path to go on along, and stays.
        """
        assert self.actor is not None
        horizon = np.array([max(1, round(ahead / walk.every))])
        path, p = np.stack(walk.path), self.learner.actor.num_params
        weights: Singles = path[-1].copy()
        for predictor, part in ((self.actor, slice(0, p)), (self.critic, slice(p, None))):
            if predictor is not None and not np.array_equal(path[0, part], path[-1, part]):
                weights[part] = predictor.forecast(Prefix(np.ascontiguousarray(path[:, part])), horizon)[0]
        if self.config.log_std_drop is not None:
            least = path[-1, self._log_std] - np.float32(self.config.log_std_drop)
            weights[self._log_std] = np.maximum(weights[self._log_std], least)
        return weights


def warn_if_too_short(owner: str, option: str, first_jump: int, total_timesteps: int, num_iterations: int) -> None:
    """Warn where training ends before a run can jump; `option` is what sets `first_jump`."""
    if num_iterations <= first_jump:
        warnings.warn(
            f"{owner}: no run will jump: the first jump comes after {first_jump} iterations ({option}), and "
            f"total_timesteps = {total_timesteps} makes {num_iterations}",
            stacklevel=3,
        )


def rows_of(forecaster: Forecaster) -> int:
    """Return how many checkpoints of a path to show the forecaster: an even number, and room for a forecast."""
    return max(MIN_ROWS, 2 * (forecaster.model.config.max_len * 2 // 3 // 2))
