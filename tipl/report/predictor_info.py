"""What the report calls the predictors, and how each forecasts."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PredictorInfo:
    """A predictor's label and how it forecasts. A floor is computed from the true weights and bounds all forecasts."""

    label: str
    description: str
    is_floor: bool = False


PREDICTORS: dict[str, PredictorInfo] = {
    "tipl": PredictorInfo("TIPL", "the causal Transformer continues the coordinates of the observed prefix"),
    "tipl_gated": PredictorInfo(
        "TIPL, gated", "TIPL's forecast where its confidence is at least one half, elsewhere the last checkpoint seen"
    ),
    "tipl_tuned": PredictorInfo(
        "TIPL, tuned",
        "a step along TIPL's displacement; its length gave the highest return on validation and training trials",
    ),
    "transformer": PredictorInfo(
        "Transformer alone", "TIPL's forecast before the refiner: it stays in the span of the prefix's directions"
    ),
    "persistence": PredictorInfo("persistence", "nothing changes: every future checkpoint is the last one seen"),
    "linear": PredictorInfo(
        "linear",
        "every weight continues at its mean speed over the last checkpoints; the window is fitted on training trials",
    ),
    "quadratic": PredictorInfo(
        "quadratic",
        "every weight continues along a parabola through the last checkpoints; the window is fitted likewise",
    ),
    "rank1": PredictorInfo(
        "rank-1 linear", "the prefix's first direction alone, its coordinate continued by a regression line"
    ),
    "autoregression": PredictorInfo(
        "autoregression",
        "each coordinate's next step is a linear combination of its last ones, fitted on training trials",
    ),
    "mean_path": PredictorInfo(
        "mean path", "the last checkpoint, plus the mean further displacement of the training trials, in coordinates"
    ),
    "nearest_path": PredictorInfo(
        "nearest path",
        "the last checkpoint, plus the further displacement of the training trial with the nearest prefix, in "
        "coordinates",
    ),
    "ridge": PredictorInfo(
        "ridge",
        "every weight's further displacement is a linear combination of its own past, fitted for each tensor on "
        "training trials",
    ),
    "nowcaster": PredictorInfo(
        "nowcaster", "a small network (after WNN) forecasts every weight from five of its own past values"
    ),
    "another_run": PredictorInfo(
        "another run",
        "the weights of the training trial with the nearest prefix at the same checkpoint: not a forecast of this run, "
        "but a policy after as much training",
    ),
    "basis_floor": PredictorInfo(
        "basis floor",
        "the true weights projected on the basis: no forecast within that basis can be nearer to the truth",
        is_floor=True,
    ),
    "shared_floor": PredictorInfo(
        "shared-basis floor",
        "the true weights projected on one basis of all training trials, with as many directions as the prefix's",
        is_floor=True,
    ),
    "prefix_floor": PredictorInfo(
        "prefix-basis floor",
        "the true weights projected on the directions of the observed prefix, as many as the shared basis has",
        is_floor=True,
    ),
    "return_floor": PredictorInfo(
        "return noise",
        "the true policy run again on other episode seeds: smaller differences in return are chance",
        is_floor=True,
    ),
}


BASIS_FLOORS = ("basis_floor", "shared_floor", "prefix_floor")
"""Floors of the forecaster's own basis, and of the other kind of basis (shared or of the prefix)."""


def predictor_info(name: str) -> PredictorInfo:
    """Return label and description of the predictor called `name` in results.json; an unknown one keeps its name."""
    return PREDICTORS.get(name) or PredictorInfo(name, "not known to this version of tipl, shown as it was found")
