"""IREE as a decoder beside `tipl.Decoder`: torch's step compiled for this machine; its caches are the module's own."""

from pathlib import Path

import iree.runtime
import numpy as np
import torch
from iree.turbine import aot
from iree.turbine.aot.decompositions import current_aot_decompositions
from torch import Tensor
from torch_peers import CompiledStep, Floats

from tipl import TrajectoryTransformer, _core


class IreeStep(CompiledStep):
    """The compiled step with attention written out: IREE 3.13 does not take the mask of torch's own."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, pos: Tensor, slot: int) -> Tensor:
        keys.index_copy_(2, pos, k)
        values.index_copy_(2, pos, v)
        scores = (q @ keys.transpose(2, 3)) * q.shape[3] ** -0.5
        return torch.where(self.mask[pos][None, None], scores, torch.full((), -1e9)).softmax(3) @ values


class IreeRollout:
    """`TrajectoryTransformer.rollout` from one observed token `start` (B, 1, k), over a cache."""

    def __init__(self, model: TrajectoryTransformer, start: Floats, folder: Path) -> None:
        step = IreeStep(model, len(start)).eval()
        output = aot.export(step.exported(torch.from_numpy(start)).run_decompositions(current_aot_decompositions()))
        output.session.set_flags("--iree-llvmcpu-target-cpu=host", "--iree-opt-level=O3")
        output.compile(save_to=folder / "step.vmfb", target_backends=["llvm-cpu"])
        config = iree.runtime.Config("local-task" if len(start) > 1 and _core.available_cpus() > 1 else "local-sync")
        module = iree.runtime.VmModule.mmap(config.vm_instance, str(folder / "step.vmfb"))
        self.step = iree.runtime.load_vm_module(module, config).main
        self.start = iree.runtime.asdevicearray(config.device, start)
        self.positions = [iree.runtime.asdevicearray(config.device, np.array([t])) for t in range(model.config.max_len)]

    def __call__(self, n: int) -> Floats:
        """Return the path (B, n, k) that follows the start."""
        last, x, path = self.start, self.start, []
        for t in range(n):
            last, x = x, self.step(x, last, self.positions[t])
            path.append(x)
        return np.concatenate([it.to_host() for it in path], 1)
