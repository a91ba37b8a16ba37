"""Streams of ``PairConnect``: a refused id changes nothing, and casts, swaps and bad states are seen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel.models import PairConnectLM
from quernel.nn import PairConnect, PairTable

VOCAB, WINDOW = 10, 4


def made(dtype: torch.dtype = torch.float32, out_proj: bool = False, **options: Any) -> PairConnect:
    generator = torch.Generator().manual_seed(0)
    table = PairTable(60, 8, vocab=VOCAB, std=1.0, dtype=dtype, generator=generator)
    return PairConnect(table, WINDOW, **{"rel_buckets": 3} | options, out_proj=out_proj)


def ids_of(batch: int, steps: int) -> Tensor:
    return torch.randint(0, VOCAB, (steps, batch), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**32 + 1, -(2**31), -(2**40)])
@pytest.mark.parametrize(("batch", "place"), [(1, 0), (3, 0), (3, 2)])
@pytest.mark.usefixtures("poisoned_memory")
@torch.no_grad()
def test_a_refused_id_leaves_the_stream_as_it_was(bad: int, batch: int, place: int) -> None:
    layer = made()
    stream, state = layer.stream(batch), layer.start(batch)
    for ids in ids_of(batch, WINDOW + 2):
        wrong = ids.clone()
        wrong[place] = bad
        before = stream.state.clone()
        with pytest.raises(QuernelError, match=rf"ids must be in \[0, {VOCAB}\); got {bad}"):
            stream.step(wrong)
        assert torch.equal(stream.state, before)
        y, state = layer.step(state, ids)
        assert torch.equal(stream.step(ids), y)


@torch.no_grad()
def test_a_language_model_goes_on_after_a_refusal() -> None:
    model = PairConnectLM(VOCAB, 16, layers=2, window=WINDOW, rows=200).eval()
    stream, state = model.stream(2), model.start(2)
    for ids in ids_of(2, WINDOW + 2):
        with pytest.raises(QuernelError, match=f"got {VOCAB}"):
            stream.step(torch.tensor([0, VOCAB]))
        logits, state = model.step(state, ids)
        torch.testing.assert_close(stream.step(ids), logits, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(one.state, state) for one in stream.streams)


@torch.no_grad()
def test_a_state_with_an_id_out_of_range_is_refused() -> None:
    layer = made()
    stream = layer.stream(1)
    stream.state[0, 1] = VOCAB + 2
    with pytest.raises(QuernelError, match=f"got {VOCAB + 2}"):
        stream.step(torch.tensor([1]))
    model = PairConnectLM(VOCAB, 16, window=WINDOW, rows=200).eval()
    for state in (model.start(1)[0], model.start(1).long()):
        with pytest.raises(QuernelError, match=r"state must be torch.int32 of shape \(1, 4\), as step returns it"):
            model.stream(1).start_from(state)


@pytest.mark.parametrize("out_proj", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_streams_of_cast_layers_equal_their_steps(dtype: torch.dtype, out_proj: bool) -> None:
    layer = made(out_proj=out_proj).to(dtype)
    stream, state = layer.stream(2), layer.start(2)
    for ids in ids_of(2, WINDOW + 2):
        y, state = layer.step(state, ids)
        got = stream.step(ids)
        assert got.dtype is y.dtype is dtype
        assert torch.equal(got, y)


@pytest.mark.parametrize("kind", [{}, {"normalise": "softmax", "relative": "bias"}], ids=str)
@torch.no_grad()
def test_a_stream_follows_what_becomes_of_its_layer(kind: dict[str, Any]) -> None:
    layer = made(out_proj=True, **kind)
    stream, state = layer.stream(2), layer.start(2)

    def replaced() -> None:
        layer.table.weight = nn.Parameter(layer.table.weight * 2)

    def pointed_elsewhere() -> None:
        layer.table.weight.data = layer.table.weight.data * 3

    def another_table() -> None:
        layer.table = PairTable(60, 8, vocab=VOCAB, dtype=layer.table.weight.dtype)

    def loaded() -> None:
        layer.load_state_dict({k: v * 0.5 for k, v in layer.state_dict().items()}, assign=True)

    changes = (layer.double, replaced, pointed_elsewhere, another_table, loaded, layer.float)
    for ids, change in zip(ids_of(2, len(changes)), changes, strict=True):
        change()
        y, state = layer.step(state, ids)
        got = stream.step(ids)
        assert got.dtype is y.dtype
        assert torch.equal(got, y)


@torch.no_grad()
def test_a_copy_of_a_stream_goes_its_own_way() -> None:
    layer, (first, second) = made(), ids_of(2, 2)
    stream = layer.stream(2)
    stream.step(first)
    twin = copy.deepcopy(stream)
    y = stream.step(second)
    assert torch.equal(twin.step(second), y)


@torch.no_grad()
def test_what_a_cast_makes_impossible_is_named_and_generation_does_without() -> None:
    layer = made(normalise="softmax").bfloat16()
    with pytest.raises(QuernelError, match=r"must be torch.float32 for a stream; decode with step\(state, ids\)"):
        layer.stream()
    stream = made(normalise="softmax").stream()
    stream.layer.bfloat16()
    with pytest.raises(QuernelError, match=r"must be torch\.float32 for a stream"):
        stream.step(torch.tensor([1]))
    with pytest.raises(QuernelError, match=r"float32, float64 or bfloat16; they are torch.float16"):
        made().half().stream()
    for options in ({"normalise": "softmax"}, {}):
        model = PairConnectLM(VOCAB, 16, window=WINDOW, rows=200, **options).eval().bfloat16()
        state = model.start(2)
        ids, wanted = ids_of(2, 3).T.contiguous(), []
        for t in range(3):
            logits, state = model.step(state, ids[:, t])
        for _ in range(4):
            wanted.append(logits.argmax(-1))
            logits, state = model.step(state, wanted[-1])
        assert torch.equal(model.generate(ids, 4)[:, 3:], torch.stack(wanted, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second kind of device")
def test_ids_of_another_device_are_refused() -> None:
    with pytest.raises(QuernelError, match=r"on the CPU; got torch\.int64"):
        made().stream(1).step(torch.tensor([1], device="cuda"))


def test_ids_without_memory_are_refused() -> None:
    with pytest.raises(QuernelError, match=r"on the CPU; got torch\.int64"):
        made().stream(1).step(torch.zeros(1, dtype=torch.int64, device="meta"))
