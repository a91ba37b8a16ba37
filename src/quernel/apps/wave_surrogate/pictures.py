"""Fields as PNG pictures without an image library: 256 colours, zlib, data URIs for a page of one file."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
import numpy.typing as npt
from torch import Tensor

from quernel._errors import QuernelError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Blue through white to red: what is zero is white, both signs weigh the same.
_ANCHORS = np.array(
    [[10, 46, 93], [36, 98, 154], [146, 190, 219], [250, 249, 246], [236, 166, 128], [190, 70, 40], [103, 18, 24]]
)


def diverging_palette() -> npt.NDArray[np.uint8]:
    """Return 255 colours, shape (255, 3), the middle one for zero."""
    place = np.linspace(0, len(_ANCHORS) - 1, 255)
    columns = [np.interp(place, np.arange(len(_ANCHORS)), _ANCHORS[:, c]) for c in range(3)]
    return np.stack(columns, axis=1).round().astype(np.uint8)


def field_png(field: Tensor, scale: float) -> bytes:
    """Return a PNG of a field, shape (height, width): -scale is blue, 0 white, +scale red; beyond is clipped.

    NaN is drawn as the far end of red.
    """
    if field.ndim != 2 or 0 in field.shape:
        raise QuernelError(f"field must be of shape (height, width); got {tuple(field.shape)}")
    if not scale > 0:
        raise QuernelError(f"scale must be positive; got {scale!r}")
    share = np.nan_to_num(field.detach().double().cpu().numpy() / scale, nan=1.0)
    index = (127 + 127 * np.clip(share, -1.0, 1.0)).round().astype(np.uint8)
    height, width = index.shape
    # Every line begins with the number of its filter, 0 for none.
    lines = np.concatenate([np.zeros((height, 1), np.uint8), index], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"PLTE", diverging_palette().tobytes()),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    ]
    return SIGNATURE + b"".join(_chunk(name, content) for name, content in chunks)


def data_uri(png: bytes) -> str:
    """Return the picture as the address of itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
