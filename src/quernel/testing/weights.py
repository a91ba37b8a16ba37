"""Conformance of storage formats: products and rows agree with the dense weight, bytes are bytes."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from quernel.nn.weights import StoredWeight, unique_bytes
from quernel.testing._modules_shared import (
    check_config_round_trip,
    check_damaged_files,
    check_save_and_load,
    check_state_is_stable,
    made,
)
from quernel.testing._suite import ConformanceError, generator, require, require_close, run_all

# Formats compute in bfloat16 at the coarsest: 8 bits of mantissa, summed over the inputs.
COARSE = 3e-2


def check_weight(cls: type) -> None:
    """Run every check of the ``weight`` contract."""
    run_all(cls, "weight")


def check_shape(cls: type) -> None:
    """``dense()`` has the logical shape and finite values."""
    weight = _made(cls)
    dense = weight.dense()
    shape = tuple(dense.shape)
    require(shape == tuple(weight.shape), cls, f"dense() has shape {shape}, not {weight.shape}")
    require(bool(dense.isfinite().all()), cls, "dense() is not finite")


def check_products(cls: type) -> None:
    """``matmul(x)`` is ``x @ dense().T`` for vectors, batches, empty and non-contiguous inputs."""
    weight = _made(cls)
    dense = weight.dense().float().detach()
    if dense.ndim != 2:
        return
    for shape in ((1,), (3,), (2, 5), (0,)):
        x = torch.randn(*shape, dense.shape[1], generator=generator())
        scale = float(dense.norm())
        require_close(cls, f"matmul at {tuple(x.shape)}", weight.matmul(x), F.linear(x, dense), atol=COARSE * scale)
    wide = torch.randn(4, 2 * dense.shape[1], generator=generator())[:, ::2]
    same = weight.matmul(wide.contiguous())
    require_close(cls, "matmul of a non-contiguous input", weight.matmul(wide), same)


def check_rows(cls: type) -> None:
    """``rows(ids)`` is ``dense()[ids]``."""
    weight = _made(cls)
    dense = weight.dense().detach()
    if dense.ndim != 2:
        return
    ids = torch.randint(0, dense.shape[0], (3, 4), generator=generator())
    require_close(cls, "rows", weight.rows(ids), dense[ids], rtol=1e-2)


def check_bytes(cls: type) -> None:
    """``nbytes`` counts every stored tensor once."""
    weight = _made(cls)
    require(weight.nbytes == unique_bytes(weight), cls, f"nbytes is {weight.nbytes}, stored are {unique_bytes(weight)}")
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in weight.state_dict().values()}
    require(weight.nbytes == sum(tensors.values()), cls, "nbytes is not the sum over the state dict")


def _made(cls: type) -> StoredWeight:
    weight, _ = made(cls)
    if not isinstance(weight, StoredWeight):
        raise ConformanceError(f"{cls.__name__}: is not a StoredWeight")
    return weight


CHECKS = {
    "shape": check_shape,
    "products": check_products,
    "rows": check_rows,
    "bytes": check_bytes,
    "config_round_trip": check_config_round_trip,
    "state_is_stable": check_state_is_stable,
    "save_and_load": check_save_and_load,
    "damaged_files": check_damaged_files,
}
