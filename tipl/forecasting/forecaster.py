"""Continue runs: the weights of a prefix in, the weights of its forecast future out.

Shapes  B trials, p weights, k = n_components, h = prefix_end, n = horizon.
"""

import dataclasses
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tipl.files.manifest import check_folder
from tipl.files.schema import parse
from tipl.files.sealed import UncheckedWarning
from tipl.forecasting.confidence import Confidence, Strides
from tipl.forecasting.decoder import continue_paths
from tipl.forecasting.forecast import Forecast
from tipl.forecasting.refiner import Refiner
from tipl.forecasting.sources import Source, Split
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.transformer import BareFolder, TrajectoryTransformer, load_model, save_model
from tipl.policy import Layout, layout_from_dict
from tipl.storing.store import UNKNOWN, Store
from tipl.subspace.basis import Basis, Centre

PRETRAINED = Path(__file__).with_name("pretrained")
"""The model folder that comes with tipl."""


@dataclasses.dataclass(frozen=True)
class TrainedOn:
    """What config.json says of a store that taught the forecaster."""

    env_id: str
    policy: dict[str, Any]
    seeds: list[int]
    split: Split
    path_length: int | None = None
    """Checkpoints of each path, where they were thinned; None where they were not, or an older tipl trained."""

    def __post_init__(self) -> None:
        layout_from_dict(self.policy)
        for trial in self.split.train + self.split.validation + self.split.heldout:
            if not 0 <= trial < len(self.seeds):
                raise ValueError(f"split: trials must lie in [0, {len(self.seeds)}), got {trial}")


@dataclasses.dataclass(frozen=True)
class TrainedFolder(BareFolder):
    """What config.json of a folder that `train` wrote holds."""

    stores: list[TrainedOn]
    num_checkpoints: int
    train: TrainConfig
    calibrated_on: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.num_checkpoints != self.model.max_len:
            raise ValueError(
                f"num_checkpoints must be the model's max_len, {self.model.max_len}, got {self.num_checkpoints}"
            )


@dataclasses.dataclass(frozen=True)
class Forecaster:
    """A trained Transformer, the basis that it speaks in, and what refines its forecasts."""

    model: TrajectoryTransformer
    shared_basis: Basis | None = None
    """The basis of all training trials; None where each prefix has its own, the default."""
    centre: Centre | None = None
    """The training trials' mean path; None where the model's coordinates are not centred."""
    refiner: Refiner | None = None
    """None where forecasts stay in the basis."""
    confidence: Confidence | None = None
    """None where it was not calibrated."""
    strides: Strides | None = None
    """None where they were not, or on several stores."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The model folder's config.json."""

    @classmethod
    def load(cls, folder: str | Path) -> "Forecaster":
        """Return the forecaster in a model folder written by `train`; one without checksums, of an older tipl's, warns.

        Raises FileNotFoundError where a file is missing, RuntimeError where one is damaged or of another folder.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"Forecaster.load: {folder} is no model folder: config.json is missing")
        has_manifest = check_folder(folder)
        # Modules are made with random weights before they get their own: the caller's random numbers stay as they are.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            if not has_manifest:
                warnings.simplefilter("ignore", UncheckedWarning)  # of each file: one of the folder is enough
            return cls._load(folder)

    @classmethod
    def _load(cls, folder: Path) -> "Forecaster":
        model, config = load_model(folder)
        if "train" in config:
            parse(TrainedFolder, config, folder / "config.json")
        shared = config.get("train", {}).get("basis") == "shared"
        basis = Basis.load(folder / "basis.safetensors") if shared else None
        if basis is not None and basis.n_components != model.config.n_components:
            raise RuntimeError(
                f"Forecaster.load: {folder}: the basis has {basis.n_components} components, the model "
                f"{model.config.n_components}"
            )
        centre = Centre.load(folder / "centre.safetensors") if "train" in config else None
        if centre is not None and centre.paths.shape[1:] != (model.config.max_len, model.config.n_components):
            raise RuntimeError(
                f"Forecaster.load: {folder}: the centre's paths {centre.paths.shape} do not fit the model"
            )
        steps = config.get("train", {}).get("refine_steps", 0)
        refiner = Refiner.load(folder / "refiner.safetensors") if steps else None
        calibrated = folder / "confidence.safetensors", folder / "strides.safetensors"
        confidence = Confidence.load(calibrated[0]) if calibrated[0].is_file() else None
        strides = Strides.load(calibrated[1]) if calibrated[1].is_file() else None
        return cls(model, basis, centre, refiner, confidence, strides, config)

    def save(self, folder: Path) -> None:
        """Write a model folder, its manifest last, which lists all files in it."""
        parts = {
            "basis": self.shared_basis,
            "centre": self.centre,
            "refiner": self.refiner,
            "confidence": self.confidence,
            "strides": self.strides,
        }
        for name, part in parts.items():
            if part is not None:
                part.save(folder / f"{name}.safetensors")
        save_model(self.model, folder, self.config)

    def source_of(self, store: Store) -> dict[str, Any] | None:
        """Return what config.json says of a store that the forecaster was trained on, its split among it, or None."""
        known = {"env_id": store.env_id, "policy": store.policy.to_dict(), "seeds": store.seeds}
        for source in self.config.get("stores", []):
            if {name: source[name] for name in known} == known:
                return dict(source)
        return None

    def is_of_task(self, env_id: str, policy: Layout | None = None) -> bool:
        """Return whether it was trained on runs of this task alone, in whatever version of it.

        Where the task is UNKNOWN, it must have been trained on one task alone, and on policies as large as `policy`.
        """
        stores = self.config.get("stores", [])
        tasks = {_unversioned(source["env_id"]) for source in stores}
        if env_id != UNKNOWN:
            return tasks == {_unversioned(env_id)}
        sizes = {layout_from_dict(source["policy"]).num_params for source in stores}
        return len(tasks) == 1 and UNKNOWN not in tasks and policy is not None and policy.num_params in sizes

    def layout_of(self, num_params: int) -> Layout:
        """Return the layout of those policies with `num_params` weights that the forecaster was trained on.

        Raises ValueError where there is none, or more than one.
        """
        layouts = [layout_from_dict(source["policy"]) for source in self.config.get("stores", [])]
        shapes = {str(it.shapes): it for it in layouts if it.num_params == num_params}
        if len(shapes) != 1:
            raise ValueError(
                f"rollout: layout must be given (a store's `policy`): the forecaster was trained on {len(shapes)} "
                f"kinds of policies of {num_params} weights, and refines forecasts tensor by tensor"
            )
        return next(iter(shapes.values()))

    def basis_of(self, prefix: NDArray[np.float32]) -> Basis:
        """Return the basis in which the forecast of `prefix` (h+1, p) is made."""
        if self.shared_basis is not None:
            return self.shared_basis.through(prefix[-1])
        return Basis.from_prefix(prefix, self.model.config.n_components)

    def forecast(
        self,
        prefixes: Sequence[NDArray[np.float32]],
        horizons: Sequence[int],
        *,
        layout: Layout | None = None,
        bases: Sequence[Basis] | None = None,
        num_threads: int | None = None,
        device: str = "cpu",
    ) -> list[Forecast]:
        """Return the forecast of each run, in one batch; prefixes (h+1, p) and horizons n may differ between runs.

        All runs have one kind of policy. `layout` says which tensors the p weights are; by default it is that of the
        training trials with p weights. `bases` are what `basis_of` gives each prefix, where that is known already.
        `device` is where the Transformer runs, as in `Decoder`.
        """
        bases = [self.basis_of(prefix) for prefix in prefixes] if bases is None else bases
        observed = [basis.encode(prefix) for basis, prefix in zip(bases, prefixes, strict=True)]
        futures = self.continue_coordinates(observed, horizons, num_threads=num_threads, device=device)
        if self.refiner is not None and layout is None:
            layout = self.layout_of(prefixes[0].shape[1])
        trust = float(self.config.get("train", {}).get("trust", 1.0))
        return [
            Forecast(*parts, layout, self.refiner, self.confidence, self.strides, self.model.config.max_len, trust)
            for parts in zip(bases, observed, futures, prefixes, strict=True)
        ]

    def continue_coordinates(
        self,
        observed: Sequence[NDArray[np.float32]],
        horizons: Sequence[int],
        *,
        num_threads: int | None = None,
        device: str = "cpu",
    ) -> list[NDArray[np.float32]]:
        """Return the coordinates (n, k) that follow observed ones (h+1, k), of any lengths: one native batch."""
        if self.centre is None:
            return continue_paths(self.model, observed, horizons, num_threads=num_threads, device=device)
        means = [self.centre.at(len(path) - 1) for path in observed]
        departures = [path - mean[: len(path)] for path, mean in zip(observed, means, strict=True)]
        futures = continue_paths(self.model, departures, horizons, num_threads=num_threads, device=device)
        continued = []
        for departure, future, mean in zip(departures, futures, means, strict=True):
            length, last = len(departure), departure[-1:]
            trusted = last + self.centre.trust_at(length - 1) * (future - last)
            continued.append(np.asarray(trusted + mean[length : length + len(future)], dtype=np.float32))
        return continued


def load_pretrained() -> Forecaster:
    """Return the forecaster that comes with tipl, trained on seven MuJoCo tasks, for paths of at most 51 checkpoints.

    It goes 0.55 of the way that its networks predict: with such a share, forecasters that had not seen a task were
    better than persistence on it, on all of seven (docs/results/zero-shot.md). A run of more checkpoints has to be
    thinned evenly to fit, as `tipl rollout` and `evaluate` do.
    """
    return Forecaster.load(PRETRAINED)


def rollout(
    prefix_weights: NDArray[np.float32],
    horizon: int,
    model: Forecaster | TrajectoryTransformer | str | Path | None = None,
    *,
    layout: Layout | None = None,
    num_threads: int | None = None,
    device: str = "cpu",
) -> NDArray[np.float32]:
    """Return forecast weights (B, n, p) for the n = `horizon` checkpoints after the prefixes (B, h+1, p) or (h+1, p).

    `model` is a forecaster, a bare model (with prefix bases) or a model folder, by default the forecaster that comes
    with tipl (`load_pretrained`). `layout`, a store's `policy`, says which tensors the p weights are where the
    forecaster was not trained on such policies. Row 0 of a prefix must be the run's initial weights and its rows one
    checkpoint apart, as in training. Every trial is written in its basis, continued natively, written back and refined;
    the future of no trial is seen. `device` is where the Transformer runs: "cpu", "cuda", "cuda:1" ..., or "auto".

    Raises TypeError for weights that are not float32; ValueError for another shape, NaN or Inf, a prefix that is too
    short for a basis, a path longer than the model's max_len, weights of another size than the shared basis or the
    layout, or policies that need a layout and have none.
    """
    if model is None:
        model = load_pretrained()
    elif isinstance(model, TrajectoryTransformer):
        model = Forecaster(model)
    elif not isinstance(model, Forecaster):
        model = Forecaster.load(model)
    forecasts = check_and_forecast(
        model, prefix_weights, horizon, layout=layout, num_threads=num_threads, device=device
    )
    return np.array([forecast.weights() for forecast in forecasts])


def check_and_forecast(
    model: Forecaster,
    prefix_weights: NDArray[np.float32],
    horizon: int,
    *,
    layout: Layout | None = None,
    num_threads: int | None = None,
    device: str = "cpu",
) -> list[Forecast]:
    """Return what `rollout` writes back as weights: the forecasts themselves, with their confidence."""
    prefixes = check_prefixes(prefix_weights)
    max_len = model.model.config.max_len
    if horizon < 1 or prefixes.shape[1] + horizon > max_len:
        raise ValueError(
            f"rollout: horizon must lie in [1, {max_len - prefixes.shape[1]}] (the model knows paths of {max_len} "
            f"checkpoints and the prefix holds {prefixes.shape[1]}), got {horizon}"
        )
    if model.shared_basis is not None and model.shared_basis.directions.shape[1] != prefixes.shape[2]:
        raise ValueError(
            f"rollout: prefix_weights must hold p = {model.shared_basis.directions.shape[1]} weights for each "
            f"checkpoint, as the model's shared basis, got {prefixes.shape[2]}"
        )
    if layout is not None and layout.num_params != prefixes.shape[2]:
        raise ValueError(
            f"rollout: layout must have as many weights as prefix_weights, {prefixes.shape[2]}, got {layout.num_params}"
        )
    horizons = [horizon] * len(prefixes)
    return model.forecast(list(prefixes), horizons, layout=layout, num_threads=num_threads, device=device)


def check_prefixes(prefix_weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return observed weights as (B, h+1, p), or say what is wrong with them."""
    weights = np.asarray(prefix_weights)
    if weights.dtype != np.float32:
        raise TypeError(f"rollout: prefix_weights must be float32, got {weights.dtype}")
    if weights.ndim not in (2, 3) or 0 in weights.shape:
        raise ValueError(f"rollout: prefix_weights must have shape (B, h+1, p) or (h+1, p), got {weights.shape}")
    weights = weights.reshape(-1, *weights.shape[-2:])
    bad = ~np.isfinite(weights).all(axis=2)
    if bad.any():
        trial, row = np.argwhere(bad)[0]
        raise ValueError(f"rollout: prefix_weights must be finite, got NaN or Inf in trial {trial}, checkpoint {row}")
    return weights


def source_to_judge(store: Store, forecaster: Forecaster) -> Source:
    """Return the store with the split by which the forecaster was trained on it.

    A store that it was not trained on is judged zero-shot, on the trials that training would have held out: the others
    still teach the baselines. Raises ValueError where the forecaster may have seen some of the trials in another store,
    or knows these policies not at all.
    """
    config = forecaster.config
    if "stores" not in config:
        raise ValueError("evaluate: the model is not from `tipl train`: its config.json holds no split of trials")
    known = forecaster.source_of(store)
    if known is not None:
        is_thinned = config["train"]["num_checkpoints"] is not None
        found = store.num_checkpoints
        length = known.get("path_length", found if is_thinned else config["num_checkpoints"])
        if found != length:
            raise ValueError(
                f"evaluate: the model does not fit the store {store.path}: it was trained on num_checkpoints = "
                f"{length}, the store has {found}"
            )
        return Source(store, Split(**known["split"]), config["num_checkpoints"], length)
    for other in config["stores"]:
        if other["env_id"] == store.env_id and (common := sorted(set(other["seeds"]) & set(store.seeds))):
            raise ValueError(
                f"evaluate: the model does not fit the store {store.path}: it was trained on another one with the same "
                f"{len(common)} of its {store.num_trials} seeds, so that it may have seen what it is judged on"
            )
    if forecaster.shared_basis is not None:
        raise ValueError(
            f"evaluate: the model does not fit the store {store.path}: a shared basis serves the trials of its own "
            f"store alone, which was of {config['stores'][0]['env_id']}"
        )
    length = min(store.num_checkpoints, config["num_checkpoints"])
    return Source.of(store, TrainConfig(**{**config["train"], "num_checkpoints": length, "in_sample": False}))


def _unversioned(env_id: str) -> str:
    """Return "Hopper" for "Hopper-v5"."""
    return re.sub(r"-v\d+$", "", env_id)
