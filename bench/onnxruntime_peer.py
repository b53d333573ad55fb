"""ONNX Runtime as a decoder beside `tipl.Decoder`: one graph for a step, its fused attention, caches written in place.

Shapes  B sequences, k = n_components.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tipl import TrajectoryTransformer, _core

Floats = NDArray[np.float32]
CACHES = ("keys", "values")
"""Beginnings of the caches' names, which a layer's number follows."""
ONNX_TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64}


class _Graph:
    """Nodes and weights, added in the order of computation."""

    def __init__(self) -> None:
        self.nodes: list[object] = []
        self.weights: list[TensorProto] = []
        self._names = map("t{}".format, itertools.count())

    def add(self, op: str, inputs: Sequence[str], outputs: Sequence[str] = (), **attributes: object) -> str:
        """Add a node; return the name of its first output."""
        named = list(outputs) or [next(self._names)]
        domain = "com.microsoft" if op == "GroupQueryAttention" else ""
        self.nodes.append(helper.make_node(op, list(inputs), named, domain=domain, **attributes))
        return named[0]

    def constant(self, value: NDArray[np.generic] | Tensor) -> str:
        array = value.detach().numpy() if isinstance(value, Tensor) else value
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), next(self._names)))
        return self.weights[-1].name

    def linear(self, x: str, layer: nn.Linear) -> str:
        return self.add("Add", [self.add("MatMul", [x, self.constant(layer.weight.T)]), self.constant(layer.bias)])

    def norm(self, x: str, layer: nn.LayerNorm) -> str:
        inputs = [x, self.constant(layer.weight), self.constant(layer.bias)]
        return self.add("LayerNormalization", inputs, epsilon=layer.eps)


def step_graph(model: TrajectoryTransformer, arrays: dict[str, NDArray[np.generic]]) -> ModelProto:
    """Return a step from x and the token before it, `last`, (B, 1, k) at slot `pos`, to y; caches go through it."""
    config, graph = model.config, _Graph()
    diff = graph.add("Mul", [graph.add("Sub", ["x", "last"]), graph.constant(np.float32(config.diff_scale))])
    token = graph.add("Concat", ["x", diff, "since_prefix"], axis=-1)
    z = graph.linear(token, model.embed)
    z = graph.add("Add", [z, graph.add("Gather", [graph.constant(model.pos.weight), "pos"])])
    for i, block in enumerate(model.blocks):
        qkv = graph.linear(graph.norm(z, block.norm1), block.qkv)
        caches = [f"{kind}{i}" for kind in CACHES]
        y = f"attended{i}"
        graph.add(
            "GroupQueryAttention",
            [qkv, "", "", *caches, "num_before", "num_slots"],
            [y, *(f"new_{cache}" for cache in caches)],
            num_heads=config.n_head,
            kv_num_heads=config.n_head,
        )
        z = graph.add("Add", [z, graph.linear(y, block.proj)])
        hidden = graph.add("Gelu", [graph.linear(graph.norm(z, block.norm2), block.fc1)], approximate="tanh")
        z = graph.add("Add", [z, graph.linear(hidden, block.fc2)])
    step = graph.linear(graph.norm(z, model.norm), model.head)
    graph.add("Add", ["x", graph.add("Mul", [step, graph.constant(np.float32(config.out_scale))])], ["y"])

    def described(name: str, like: str) -> object:
        return helper.make_tensor_value_info(name, ONNX_TYPES[arrays[like].dtype.name], arrays[like].shape)

    outputs = [described("y", "x"), *(described(f"new_{name}", name) for name in arrays if name.startswith(CACHES))]
    inputs = [described(name, name) for name in arrays]
    made = helper.make_graph(graph.nodes, "step", inputs, outputs, graph.weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


class OnnxRuntimeRollout:
    """`TrajectoryTransformer.rollout` from one observed token `start` (B, 1, k), over a cache."""

    def __init__(self, model: TrajectoryTransformer, start: Floats) -> None:
        config, batch_size = model.config, len(start)
        self.config, self.start = config, start
        cache = (batch_size, config.n_head, config.max_len, config.d_model // config.n_head)
        names = [f"{kind}{i}" for i in range(config.n_layer) for kind in CACHES]
        self.arrays: dict[str, NDArray[np.generic]] = {
            "x": start.copy(),
            "last": start.copy(),
            "since_prefix": np.zeros((batch_size, 1, 1), np.float32),
            "pos": np.zeros(1, np.int64),
            "num_before": np.zeros(batch_size, np.int32),
            "num_slots": np.zeros(1, np.int32),
            **{name: np.zeros(cache, np.float32) for name in names},
        }
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = _core.available_cpus()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        graph = step_graph(model, self.arrays).SerializeToString()
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        # Tokens go round through three arrays, so that a step's prediction is the next one's input without a copy.
        self.tokens = [start.copy() for _ in range(3)]
        self.bindings = [self._bound(turn) for turn in range(3)]

    def _bound(self, turn: int) -> onnxruntime.IOBinding:
        """Return what binds last, x and y to the three tokens, beginning with `turn`, and each cache to itself."""
        last, x, y = (self.tokens[(turn + i) % 3] for i in range(3))
        arrays = self.arrays | {"last": last, "x": x}
        outputs = {"y": y, **{f"new_{name}": array for name, array in arrays.items() if name.startswith(CACHES)}}
        binding = self.session.io_binding()
        for bind, bound in ((binding.bind_input, arrays), (binding.bind_output, outputs)):
            for name, array in bound.items():
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return binding

    def __call__(self, n: int) -> Floats:
        """Return the path (B, n, k) that follows the start."""
        self.tokens[0][:] = self.tokens[1][:] = self.start
        path = np.empty((len(self.start), n, self.start.shape[2]), np.float32)
        for t in range(n):
            self.arrays["since_prefix"][:] = t / self.config.max_len
            self.arrays["pos"][:] = self.arrays["num_before"][:] = t
            self.arrays["num_slots"][:] = t + 1
            self.session.run_with_iobinding(self.bindings[t % 3])
            path[:, t] = self.tokens[(t + 2) % 3][:, 0]
        return path
