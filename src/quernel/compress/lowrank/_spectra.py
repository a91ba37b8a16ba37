"""Singular values of weights, kept between calls: a search tries many targets on the same matrices.

Keyed by a digest of the weight's bytes, so an edited weight is decomposed afresh; bounded, oldest out first.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

import torch
from torch import Tensor

from quernel.compress.lowrank._ranks import Spectrum
from quernel.nn.functional.low_rank import singular_values, whitening_factor

# A 7-B transformer has 224 matrices; 4096 spectra of 4096 float64 values are 128 MiB at most.
CAPACITY = 4096

_spectra: OrderedDict[bytes, Spectrum] = OrderedDict()
_lock = threading.Lock()


def weight_digest(weight: Tensor) -> bytes:
    """Return a digest of dtype, shape and bytes of a weight."""
    plain = weight.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{plain.dtype}{tuple(plain.shape)}".encode(), digest_size=16)
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def spectrum_of(weight: Tensor) -> Spectrum:
    """Return the singular values of ``weight``, descending, read-only float64; computed once a weight."""
    key = weight_digest(weight)
    with _lock:
        if key in _spectra:
            _spectra.move_to_end(key)
            return _spectra[key]
    spectrum = singular_values(weight).to("cpu", torch.float64).numpy()
    spectrum.setflags(write=False)
    with _lock:
        _spectra[key] = spectrum
        while len(_spectra) > CAPACITY:
            _spectra.popitem(last=False)
    return spectrum


def forget() -> None:
    """Drop every kept spectrum."""
    with _lock:
        _spectra.clear()


def whitened_spectrum(weight: Tensor, gram: Tensor) -> Spectrum:
    """Return the singular values of ``weight`` times the Cholesky factor of ``gram``; not kept, data changes."""
    lower = whitening_factor(gram).to(weight.device)
    return singular_values(weight.double() @ lower).cpu().numpy()
