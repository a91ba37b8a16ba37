"""Published weights: ResNet-20 for CIFAR-10 (akamaster) and stories260K (llama2.c), as plain tensors.

A foreign pickle is only opened with ``weights_only=True`` and only after its sha256 matched.
"""

from __future__ import annotations

import io
import struct

import numpy as np

from quernel._errors import DataError
from quernel.data._kinds import Checkpoint
from quernel.data._sources import DataSet, File, Source

_HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")


def _resnet20(split: str, content: bytes) -> Checkpoint:
    import torch

    held = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # The authors saved a DataParallel module: every name begins with "module.".
    tensors = {name.removeprefix("module."): tensor for name, tensor in held["state_dict"].items()}
    return Checkpoint(tensors, {"best_prec1": float(held["best_prec1"])})


def _llama2c(split: str, weights: bytes, tokenizer: bytes) -> Checkpoint:
    """Decode llama2.c version 0: seven int32, then float32 stacks; two RoPE tables at the end are skipped."""
    import torch

    config = dict(zip(_HEADER, struct.unpack_from("<7i", weights), strict=True))
    dim, hidden, layers = config["dim"], config["hidden_dim"], config["n_layers"]
    kv = dim // config["n_heads"] * config["n_kv_heads"]
    shapes = {
        "token_embedding": (config["vocab_size"], dim),
        "attention_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv, dim),
        "wv": (layers, kv, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "norm": (dim,),
    }
    flat = np.frombuffer(weights, "<f4", offset=4 * len(_HEADER))
    tensors, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tensors[name] = torch.from_numpy(flat[start : start + size].reshape(shape).astype(np.float32))
        start += size
    return Checkpoint(tensors, config, _pieces(tokenizer, config["vocab_size"]))


def _pieces(content: bytes, size: int) -> tuple[tuple[bytes, float], ...]:
    """Decode the tokenizer: int32 longest piece, then per piece float32 score, int32 length, bytes."""
    pieces, at = [], 4
    for _ in range(size):
        score, length = struct.unpack_from("<fi", content, at)
        pieces.append((content[at + 8 : at + 8 + length], score))
        at += 8 + length
    if at != len(content):
        raise DataError(f"tokenizer of stories260k: {len(content) - at} bytes left after {size} pieces")
    return tuple(pieces)


SETS = (
    DataSet(
        "resnet20-checkpoint",
        "ResNet-20 weights for CIFAR-10, 0.27 M parameters, published top-1 91.78 %",
        "BSD-2-Clause",
        "Y. Idelbayev, github.com/akamaster/pytorch_resnet_cifar10",
        ("all",),
        (
            Source(
                _resnet20,
                {
                    "all": (
                        File(
                            "cifar10_checkpoints/resnet20-12fca82f.th",
                            "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
                            "https://raw.githubusercontent.com/akamaster/pytorch_resnet_cifar10/master/"
                            "pretrained_models/resnet20-12fca82f.th",
                        ),
                    )
                },
            ),
        ),
    ),
    DataSet(
        "stories260k",
        "Llama-type model of 260 K parameters trained on TinyStories, with its 512-piece tokenizer",
        "MIT",
        "A. Karpathy, tinyllamas (llama2.c): stories260K.bin, tok512.bin",
        ("all",),
        (
            Source(
                _llama2c,
                {
                    "all": (
                        File("lm/stories260K.bin", "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696"),
                        File("lm/tok512.bin", "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312"),
                    )
                },
            ),
        ),
    ),
)
