"""Checks of tensors from files: whether a row can hold them, with their names in messages of one line."""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor


def shown(name: object) -> str:
    """Return a name from a file so that a message may contain it: one line, shortened, without control characters."""
    text = str(name)
    text = text if len(text) <= 1000 else f"{text[:1000]}..."
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def is_parameter(key: str, tensor: Tensor) -> bool:
    """Return whether a tensor belongs in a row. Raises ValueError where it does but a row cannot hold it."""
    name, shape = shown(key), tuple(tensor.shape)
    if not tensor.is_floating_point():
        if tensor.is_complex() or tensor.is_quantized or key.endswith(("weight", "bias", "kernel")):
            raise ValueError(f"{name} is {tensor.dtype}: a row holds real floating-point numbers only")
        return False  # a counter or a mask
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is sparse ({tensor.layout}): save it with .to_dense()")
    if tensor.is_meta:
        raise ValueError(f"{name} is on the device meta: it has a shape, {shape}, but no values")
    if (
        tensor.numel()
        and 1 + sum((n - 1) * step for n, step in zip(shape, tensor.stride(), strict=True)) < tensor.numel()
    ):
        raise ValueError(f"{name} repeats its memory: it has fewer numbers than its shape {shape}; save its .clone()")
    return tensor.numel() > 0


def check_apart(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where two tensors that are not equal share memory: writing to one would change both."""
    spans = []
    for name, tensor in tensors.items():
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        begin = tensor.data_ptr()
        spans.append((str(tensor.device), begin, begin + (last + 1) * tensor.element_size(), name))
    for (device, _, end, name), (next_device, begin, _, other) in itertools.pairwise(sorted(spans)):
        if device == next_device and begin < end:
            raise ValueError(f"{shown(name)} and {shown(other)} share memory but are not equal: save their .clone()")


def to_float32(key: str, tensor: Tensor) -> Tensor:
    """Return the tensor's numbers (n,) float32 on the CPU. Raises ValueError where one is not finite."""
    exact = tensor.detach().reshape(-1).cpu()
    rounded = exact.float()
    if not rounded.isfinite().all():
        if exact.double().isfinite().all():
            raise ValueError(f"{shown(key)} must fit float32, got {float(exact.abs().max()):g}")
        raise ValueError(f"{shown(key)} must be finite, got NaN or Inf")
    return rounded
