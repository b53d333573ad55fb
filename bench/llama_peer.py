"""llama.cpp as a decoder beside `tipl.Decoder`: fed embeddings made beforehand, so that nothing but the Transformer
is asked of it, and flattered.

Shapes  B sequences, d = d_model, k = n_components.
"""

import ctypes
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tipl import TrajectoryTransformer, _core
from tipl.forecasting.transformer import Block

Floats = NDArray[np.float32]


Quantisation = Literal["f32", "f16", "q8_0"]


def write_gguf(model: TrajectoryTransformer, path: Path, quantisation: Quantisation) -> None:
    """Write the model as a GPT-2: the same arithmetic except for the head's bias and the token's embedding."""
    config = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.max_len)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(model.norm.eps)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.n_components)

    def add(name: str, weight: Tensor, *, exact: bool = False) -> None:
        array = weight.detach().numpy()
        if exact or array.ndim == 1 or quantisation == "f32":
            writer.add_tensor(name, array)
        elif quantisation == "f16":
            writer.add_tensor(name, array.astype(np.float16))
        else:
            packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def add_layer(name: str, layer: nn.Module) -> None:
        add(f"{name}.weight", layer.weight)
        add(f"{name}.bias", layer.bias)

    add("token_embd.weight", model.head.weight, exact=True)  # never looked up
    add("position_embd.weight", model.pos.weight, exact=True)
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        parts = {
            "attn_norm": block.norm1,
            "attn_qkv": block.qkv,
            "attn_output": block.proj,
            "ffn_norm": block.norm2,
            "ffn_up": block.fc1,
            "ffn_down": block.fc2,
        }
        for name, layer in parts.items():
            add_layer(f"blk.{i}.{name}", layer)
    add_layer("output_norm", model.norm)
    add("output.weight", model.head.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@llama_cpp.llama_log_callback
def ignore(level: int, text: bytes, user_data: ctypes.c_void_p) -> None: ...


class LlamaCpp:
    """llama.cpp on token embeddings (B, n, d) without positions; after the n-th step the last one repeats."""

    def __init__(self, llama: ctypes.c_void_p, max_len: int, embeddings: Floats) -> None:
        B, _, d = embeddings.shape
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = B * max_len
        params.n_seq_max = params.n_batch = params.n_ubatch = B
        params.n_threads = params.n_threads_batch = _core.available_cpus()
        self.context = llama_cpp.llama_init_from_model(llama, params)
        if not self.context:
            raise RuntimeError("LlamaCpp: llama.cpp made no context")
        self.logits_width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama))
        self.embeddings = np.ascontiguousarray(embeddings.transpose(1, 0, 2))  # (n, B, d)
        self.batch = llama_cpp.llama_batch_init(B, d, 1)
        self.batch.n_tokens = B
        self.positions = np.ctypeslib.as_array(self.batch.pos, (B,))
        for b in range(B):
            self.batch.n_seq_id[b], self.batch.seq_id[b][0], self.batch.logits[b] = 1, b, 1

    def __call__(self, n: int) -> Floats:
        """Return the head's outputs (B, k), without its bias, after the last of n steps."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        for t in range(n):
            embeddings = self.embeddings[min(t, len(self.embeddings) - 1)]
            ctypes.memmove(self.batch.embd, embeddings.ctypes.data, embeddings.nbytes)
            self.positions[:] = t
            if code := llama_cpp.llama_decode(self.context, self.batch):
                raise RuntimeError(f"LlamaCpp: llama_decode returned {code}")
            logits = llama_cpp.llama_get_logits(self.context)  # waits for them
        return np.ctypeslib.as_array(logits, (len(self.positions), self.logits_width)).copy()

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)


@contextmanager
def open_llama_cpp(model: TrajectoryTransformer, quantisation: Quantisation, embeddings: Floats) -> Iterator[LlamaCpp]:
    llama_cpp.llama_log_set(ignore, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(model, path, quantisation)
        params = llama_cpp.llama_model_default_params()
        params.use_mmap = False  # in memory of its own
        llama = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not llama:
        raise RuntimeError(f"llama.cpp does not load the model as {quantisation}")
    peer = LlamaCpp(llama, model.config.max_len, embeddings)
    try:
        yield peer
    finally:
        peer.close()
        llama_cpp.llama_model_free(llama)
