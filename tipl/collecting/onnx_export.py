"""Export to ONNX: the deterministic policy as a model that needs neither tipl nor torch.

    observation (batch, obs_dim) -> [clip] -> MLP -> clip, or tanh and rescale -> action (batch, act_dim)
                                                  -> argmax                    -> discrete action (batch,) int64

All else float32, the batch of any size. The package onnx (the extra `onnx`) writes the file; any runtime reads it.
"""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from tipl.collecting.envs import make_vec
from tipl.collecting.episodes import misfit
from tipl.collecting.policy_network import without_halves
from tipl.files.locations import write_atomically
from tipl.files.publishing import published
from tipl.policy import Activation, Layout, PolicySpec
from tipl.storing.actor_families import STATISTICS
from tipl.storing.exporter import layout_and_actor, needed_statistics, row_and_record
from tipl.storing.foreign_actors import Actor
from tipl.storing.store import UNKNOWN, UNNORMALISED

Vector: TypeAlias = NDArray[np.float64]

OPSET, IR_VERSION = 17, 8
"""Of 2022, which every runtime in use reads; nothing newer is needed."""

_ACTIVATIONS = {"tanh": "Tanh", "relu": "Relu", "elu": "Elu"}


def export_onnx(
    weights: str | Path | NDArray[np.float32],
    output: str | Path,
    *,
    policy: PolicySpec | None = None,
    checkpoint: int | None = None,
    trial: int = 0,
    env_id: str | None = None,
    normaliser: str | Path | None = None,
) -> Path:
    """Write the deterministic policy of flat weights as an ONNX model, and return its path, `output`.

    The model takes `observation` (batch, obs_dim) float32, as the environment gives it, and returns `action` (batch,
    act_dim) float32, as `model.predict(obs, deterministic=True)` of Stable-Baselines3 does: the mean action clipped to
    the action space, or squashed into it where the policy does so. Of discrete actions `action` is (batch,) int64, the
    environment's numbers of those with the greatest output. Statistics of observations that are folded into the
    weights act in it; what VecNormalize clips is clipped if `normaliser` names its file.

    Args:
        weights: a forecast that `tipl rollout` wrote, a store, or weights (p,) float32.
        policy: the layout of an array's weights, such as `store.policy`; files say it themselves.
        checkpoint: index of the checkpoint in the path, as in the forecast's `checkpoint`; by default the last one.
        trial: index of the trial, if `weights` is a store.
        env_id: the Gymnasium id of the task, whose action space actions are clipped to; by default the one that the
            file says. "none" leaves actions as they are, those of a policy that squashes between -1 and 1, discrete
            ones counted from 0.
        normaliser: the file of VecNormalize's statistics. Where they are folded into the weights, as in an array's and
            in a store's whose import or recording found them, the model clips observations to mean +- clip_obs
            standard deviations; where they are not, it normalises observations first. By default, and with "none", it
            does neither.

    Raises FileExistsError where `output` exists; OutputInUse where another process is making it; FileNotFoundError;
    ValueError where the policy is no MLP, the checkpoint does not exist, sizes differ, weights are not finite, neither
    the weights nor an argument says the layout, the task, or how observations were normalised, or the package onnx is
    not installed; TypeError where weights are not float32; RuntimeError where a file is damaged.
    """
    output = Path(output)
    _onnx()
    with published(output, "export") as aside:
        row, record = row_and_record(weights, checkpoint, trial)
        layout, actor = layout_and_actor(record)
        spec = _mlp(policy, layout, len(row), (record.get("source") or {}).get("note", ""))
        unnormalised = (record.get("source") or {}).get(UNNORMALISED)
        if isinstance(unnormalised, str) and str(normaliser) != "none":
            raise ValueError(
                f'export: {unnormalised}; normaliser="none" makes a model of the network alone, between these wrappers'
            )
        made = (record.get("env_id"), record.get("env_kwargs")) if env_id is None else (env_id, None)
        bounds = _action_bounds(spec, *made)
        observations = _Observations.of(spec, actor, bool(unnormalised), normaliser)
        spec, rows = without_halves(spec, torch.tensor(row)[None])
        write_atomically(aside, _model(spec, rows[0].numpy(), observations, bounds))
    return output


@dataclasses.dataclass(frozen=True)
class _Observations:
    """What becomes of observations before the first layer: nothing, or (clip(obs, low, high) - shift) / scale."""

    limits: tuple[Vector, Vector] | None = None
    shift_and_scale: tuple[Vector, Vector] | None = None

    @classmethod
    def of(cls, spec: PolicySpec, actor: Actor | None, unnormalised: bool, normaliser: str | Path | None) -> Self:
        """Return what `normaliser` asks for.

        `actor` says what is folded into the weights; without it, the statistics of `normaliser` are. Raises ValueError
        where they are not those of the policy, or where they are missing (`unnormalised`).
        """
        if normaliser is None and unnormalised:
            raise ValueError(
                "export: normaliser must be given, the file of VecNormalize's statistics, which the weights lack; "
                '"none" makes a model that takes normalised observations'
            )
        if normaliser is None or str(normaliser) == "none":
            return cls()
        folded = STATISTICS if actor is None else actor.normaliser
        if folded not in ("", STATISTICS):
            raise ValueError("export: normaliser must not be given: the policy's own is folded into the weights")
        statistics = needed_statistics(normaliser)
        if statistics.mean.shape != (spec.obs_dim,):
            raise ValueError(
                f"export: normaliser must be of observations of {spec.obs_dim} numbers, got {statistics.mean.size}"
            )
        reach = statistics.clip * statistics.std  # clipping before normalising is clipping after, in other units
        return cls(
            limits=(statistics.mean - reach, statistics.mean + reach) if np.isfinite(statistics.clip) else None,
            shift_and_scale=None if folded else (statistics.mean, statistics.std),
        )


def _mlp(policy: PolicySpec | None, layout: Layout | None, num_params: int, note: str) -> PolicySpec:
    """Return the layout of the weights: `layout`, or `policy` where their file says none.

    Raises ValueError where it is not known, no MLP's, or of another size.
    """
    if layout is None and policy is None:
        raise ValueError("export: policy must be given, the layout of the weights, which nothing else says")
    if layout is not None and policy not in (None, layout):
        raise ValueError(f"export: policy must be that of the weights, {layout}, got {policy}")
    spec = policy if layout is None else layout
    if not isinstance(spec, PolicySpec):
        raise ValueError(
            "export: the policy must be an MLP for ONNX; of this one only its own library knows the network"
            f"{f' ({note})' if note else ''}"
        )
    if num_params != spec.num_params:
        raise ValueError(f"export: weights must have shape (p,) = ({spec.num_params},), got ({num_params},)")
    return spec


def _action_bounds(spec: PolicySpec, env_id: Any, env_kwargs: Any) -> tuple[Vector, Vector] | None:
    """Return the least and the greatest action (act_dim,), of discrete ones (1,); or None for no bounds."""
    if env_id == "none":
        return None
    if not isinstance(env_id, str) or env_id == UNKNOWN:
        raise ValueError(
            "export: env_id must be given, whose action space the actions are clipped to; "
            '"none" leaves them as they are'
        )
    if not isinstance(env_kwargs, dict | None):
        raise RuntimeError(f"export: the weights' env_kwargs must be a JSON object, got {env_kwargs!r:.80}")
    with contextlib.closing(make_vec(env_id, 1, seeds=[0], num_threads=1, env_kwargs=env_kwargs)) as env:
        difference = misfit(spec, env)
        if difference:
            raise ValueError(f"export: a policy of {env_id} {difference}")
        return env.action_low, env.action_high


class _Graph:
    """The nodes of a model, each of which takes what the one before it returns."""

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._value = "observation"

    def constant(self, name: str, array: NDArray[Any], dtype: type = np.float32) -> str:
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array, dtype), name))
        return name

    def apply(self, operation: str, *inputs: str, **attributes: Any) -> None:
        """Add a node that takes the present value, and then the inputs; its output is the value from now on."""
        output = f"{len(self.nodes)}.{operation.lower()}"
        self.nodes.append(self.onnx.helper.make_node(operation, [self._value, *inputs], [output], **attributes))
        self._value = output

    def activate(self, activation: Activation) -> None:
        if activation == "silu":
            before = self._value
            self.apply("Sigmoid")
            self.apply("Mul", before)
        else:
            self.apply(_ACTIVATIONS[activation])

    def clip(self, name: str, limits: tuple[Vector, Vector] | None) -> None:
        for operation, word, limit in zip(("Max", "Min"), ("low", "high"), limits or (), strict=False):
            self.apply(operation, self.constant(f"{name}.{word}", limit))


def _model(
    spec: PolicySpec, row: NDArray[np.float32], observations: _Observations, bounds: tuple[Vector, Vector] | None
) -> bytes:
    """Return the bytes of the ONNX model, checked."""
    onnx = _onnx()
    helper, graph = onnx.helper, _Graph(onnx)
    graph.clip("observation", observations.limits)
    if observations.shift_and_scale is not None:
        mean, std = observations.shift_and_scale
        graph.apply("Sub", graph.constant("observation.mean", mean))
        graph.apply("Div", graph.constant("observation.std", std))
    parameters = {
        name: graph.constant(name, row[offset : offset + math.prod(shape)].reshape(shape))
        for name, (offset, shape) in spec.layout.items()
        if not name.startswith("log_std")
    }
    layers = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
    for layer in layers:
        graph.apply("Gemm", f"{layer}.weight", f"{layer}.bias", transB=1)
        if layer != layers[-1]:
            graph.activate(spec.activation)
    _act(graph, spec, bounds)
    graph.nodes[-1].output[0] = "action"

    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    before = helper.make_tensor_value_info("observation", float32, ["batch", spec.obs_dim])
    after = helper.make_tensor_value_info("action", float32, ["batch", spec.act_dim])
    if spec.discrete:
        after = helper.make_tensor_value_info("action", int64, ["batch"])
    model = helper.make_model(
        helper.make_graph(graph.nodes, "policy", [before], [after], graph.constants),
        producer_name="tipl",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model, full_check=True)
    written: bytes = model.SerializeToString(deterministic=True)
    return written


def _act(graph: _Graph, spec: PolicySpec, bounds: tuple[Vector, Vector] | None) -> None:
    """Add what makes actions of the network's outputs, as `actions_of` does."""
    if spec.discrete:
        graph.apply("ArgMax", axis=1, keepdims=0)  # the first of several
        if bounds is not None and bounds[0].any():
            graph.apply("Add", graph.constant("action.low", bounds[0], np.int64))
        return
    if spec.mean_limit is not None:
        limit = np.array(spec.mean_limit)
        graph.clip("mean", (-limit, limit))
    if not (spec.squash or spec.rescale):
        graph.clip("action", bounds)
        return
    if spec.squash:
        graph.apply("Tanh")
    if bounds is not None:
        low, high = bounds
        graph.apply("Add", graph.constant("one", np.array(1.0)))
        graph.apply("Mul", graph.constant("half", np.array(0.5)))
        graph.apply("Mul", graph.constant("action.range", high.astype(np.float32) - low.astype(np.float32)))
        graph.apply("Add", graph.constant("action.low", low))


def _onnx() -> Any:
    """Return the package onnx. Raises ValueError where it is not installed."""
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
    except ModuleNotFoundError as error:
        raise ValueError("export: the package onnx is not installed: pip install 'tipl[onnx]'") from error
    return onnx
