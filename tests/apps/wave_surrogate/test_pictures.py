"""PNG pictures of fields: decoded again by hand, byte by byte; colours, clipping, refusals."""

import base64
import struct
import zlib

import numpy as np
import pytest
import torch

from quernel._errors import QuernelError
from quernel.apps.wave_surrogate.pictures import SIGNATURE, data_uri, diverging_palette, field_png


def decoded(png):
    """Return the colour indices and the palette of an indexed PNG, checking its structure."""
    assert png.startswith(SIGNATURE)
    chunks, place = [], len(SIGNATURE)
    while place < len(png):
        (size,) = struct.unpack_from(">I", png, place)
        name, content = png[place + 4 : place + 8], png[place + 8 : place + 8 + size]
        (check,) = struct.unpack_from(">I", png, place + 8 + size)
        assert check == zlib.crc32(name + content)
        chunks.append((name, content))
        place += 12 + size
    assert [name for name, _ in chunks] == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    parts = dict(chunks)
    width, height, *kind = struct.unpack(">IIBBBBB", parts[b"IHDR"])
    assert kind == [8, 3, 0, 0, 0]
    lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:], np.frombuffer(parts[b"PLTE"], np.uint8).reshape(-1, 3)


def test_values_become_colours():
    field = torch.tensor([[-2.0, -1.0, 0.0], [0.5, 1.0, torch.nan]])
    index, palette = decoded(field_png(field, 1.0))
    assert index.tolist() == [[0, 0, 127], [190, 254, 254]]
    assert np.array_equal(palette, diverging_palette())


def test_the_palette_is_white_in_the_middle_and_as_dark_at_both_ends():
    palette = diverging_palette().astype(int)
    assert palette.shape == (255, 3)
    assert palette[127].min() > 240
    low, high = palette[0], palette[-1]
    assert low[2] > low[0]
    assert high[0] > high[2]
    lightness = palette.sum(1)
    assert all(np.diff(lightness[:128]) >= 0)
    assert all(np.diff(lightness[127:]) <= 0)


def test_another_decoder_agrees():
    image = pytest.importorskip("PIL.Image")
    import io

    field = torch.linspace(-1, 1, 35).reshape(5, 7)
    opened = image.open(io.BytesIO(field_png(field, 1.0)))
    index, palette = decoded(field_png(field, 1.0))
    assert opened.size == (7, 5)
    assert np.array_equal(np.asarray(opened.convert("RGB")), palette[index])


def test_the_address_is_the_picture():
    png = field_png(torch.ones(2, 2), 1.0)
    head, _, body = data_uri(png).partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(body) == png


def test_bad_input_is_named():
    with pytest.raises(QuernelError, match=r"field must be of shape \(height, width\)"):
        field_png(torch.ones(1, 2, 2), 1.0)
    with pytest.raises(QuernelError, match="scale must be positive"):
        field_png(torch.ones(2, 2), 0.0)
