"""``to_onnx``: plain-torch results run in onnxruntime with equal outputs; layers on own kernels are refused by name."""

import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.compress import (
    DGQ,
    SNNK,
    Cast,
    CrossQuant,
    FeatureMerging,
    UniformLowRank,
    WeightInt8,
    WeLore,
    compress,
    to_onnx,
)

onnxruntime = pytest.importorskip("onnxruntime")

# Sums in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(32, 4)).eval()


def images(n=2):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        WeLore(),
        UniformLowRank(),
        WeightInt8(),
        FeatureMerging(beta=1.0, max_ratio=0.5),
        SNNK(n_features=16, projection="orthogonal"),
        DGQ(act=None, grid=(2, 6), min_tokens=2),
    ],
    ids=lambda m: type(m).__name__,
)
def test_plain_results_run_in_onnxruntime(method, tmp_path):
    x = images()
    small = compress(net(), method, data=[x]).model
    file = to_onnx(small, (x,), tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for n in (2, 5):  # the batch axis is free
        (got,) = session.run(None, {session.get_inputs()[0].name: images(n).numpy()})
        torch.testing.assert_close(torch.from_numpy(got), small(images(n)).detach(), **TOLERANCE)


def test_layers_on_own_kernels_are_refused_by_name(tmp_path):
    x = images()
    small = compress(net(), CrossQuant(), data=[x]).model
    with pytest.raises(QuernelError, match=r"2 layers on kernels of Quernel.*4 \(int8_linear\)"):
        to_onnx(small, (x,), tmp_path / "small.onnx")
    half = compress(net(), Cast("bfloat16")).model
    with pytest.raises(QuernelError, match=r"bfloat16 tensors \(.*model\.float\(\)"):
        to_onnx(half, (x,), tmp_path / "small.onnx")
    assert not list(tmp_path.iterdir())


def test_what_torch_cannot_export_is_an_error_of_ours(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(QuernelError, match=r"torch\.export cannot take Branching: .*branch on values"):
        to_onnx(Branching(), (images(),), tmp_path / "small.onnx")
