"""PairConnectLM and its wrapper: causal, decoded from ids, saved, trained; transformers generates the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from quernel import load, models
from quernel._errors import QuernelError
from quernel.models import PairConnectLM

VOCAB, T = 20, 13
SAME = {"rtol": 1e-5, "atol": 1e-5}


def made(**options: Any) -> PairConnectLM:
    torch.manual_seed(0)
    model = PairConnectLM(**{"vocab": VOCAB, "dim": 16, "window": 5, "rows": 500} | options).eval()
    with torch.no_grad():  # larger rows, so that pairs matter
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids_of(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_depend_on_the_window_alone_however_deep() -> None:
    model, ids = made(layers=3), ids_of()
    for s in range(T):
        changed = ids.clone()
        changed[:, s] = (changed[:, s] + 1) % VOCAB
        moved = (model(changed).logits != model(ids).logits).any(-1).any(0)
        assert moved.nonzero().flatten().tolist() == list(range(s, min(T, s + 5)))


@pytest.mark.parametrize("options", [{}, {"normalise": "softmax"}, {"direct": True, "rows": 3200}, {"storage": "bf16"}])
@torch.no_grad()
def test_steps_equal_the_parallel_forward(options: dict[str, Any]) -> None:
    model, ids = made(**options), ids_of()
    whole, state, stream = model(ids).logits, model.start(2), model.stream(2)
    for t in range(T):
        logits, state = model.step(state, ids[:, t])
        torch.testing.assert_close(logits, whole[:, t], **SAME)
        torch.testing.assert_close(stream.step(ids[:, t].contiguous()), whole[:, t], **SAME)
    assert torch.equal(stream.streams[1].state, state)
    assert state.nbytes == 2 * 4 * 5


@torch.no_grad()
def test_generation_is_the_plain_loop() -> None:
    model, ids = made(), ids_of()
    wanted = ids
    for _ in range(10):
        wanted = torch.cat([wanted, model(wanted).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, 10), wanted)
    assert torch.equal(model.generate(ids, 0), ids)
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, : T - 2] = False
    padded = model.generate(ids, 6, mask)
    assert torch.equal(padded[1:, -6:], model.generate(ids[1:, -2:], 6)[:, -6:])
    assert torch.equal(padded[0], wanted[0, : T + 6])


def test_hidden_tokens_and_training() -> None:
    torch.manual_seed(0)
    model = PairConnectLM(VOCAB, 16, window=5, rows=500, dropout=0.1)
    dense, tables = model.param_groups(1e-2)
    optimizers = torch.optim.Adam([dense]), torch.optim.Adagrad([tables])
    ids = torch.arange(64).reshape(4, 16) % 7  # a text that repeats
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.is_sparse for p in tables["params"])
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 < losses[0]


def test_saving_sharing_and_bytes(tmp_path: Any) -> None:
    model, ids = made(storage="robe", size=900, sparse=False), ids_of()
    assert model.table_bytes == 4 * 900  # one array under both layers
    twin = load(models.save(model, tmp_path))
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
    assert made().table_bytes == 2 * 4 * 500 * 16
    assert made(tied=False).head.weight is not made(tied=False).embed.weight
    seeds = {block.mixer.table.seed for block in made(layers=3).blocks}
    assert len(seeds) == 3


def test_bad_input_is_named() -> None:
    model = made()
    for call, message in (
        (lambda: model(torch.full((1, 3), VOCAB)), r"ids must be in \[0, 20\); got 20"),
        (lambda: model(torch.full((1, 3), -1)), r"ids must be in \[0, 20\); got -1"),
        (lambda: model.generate(torch.full((1, 3), 2**32), 2), "ids must be in"),
        (lambda: model.generate(torch.full((1, 3), -(2**32) + 5), 2), "ids must be in"),
        (lambda: model.generate(torch.full((1, 3), -(2**40)), 2), "ids must be in"),
        (lambda: model.generate(torch.zeros(1, 3), 2), "ids must be integers; got torch.float32"),
        (lambda: model(torch.zeros(1, 3)), "ids must be integers; got torch.float32"),
        (lambda: model(torch.zeros(1, 3), torch.ones(1, 3).bool()), "ids must be integers; got torch.float32"),
        (lambda: model.step(model.start(1), torch.zeros(1)), "ids must be integers; got torch.float32"),
        (lambda: model.generate(torch.zeros(1, 0, dtype=torch.long), 1), r"ids must have shape \(B, T\)"),
        (lambda: model.generate(ids_of(), 1, torch.zeros(2, T, dtype=torch.bool)), "pad on the left"),
        (lambda: made(size=5), "size must be given for storage='robe', and for nothing else"),
        (lambda: made(direct=True), r"20\^2 \* 8 = 3200 for direct=True; got 500"),
        (lambda: made(window=0), "window must be"),
        (lambda: made(activation="tanh"), "activation must be one of"),
    ):
        with pytest.raises(QuernelError, match=message):
            call()


@pytest.mark.slow
def test_transformers_generates_the_same(tmp_path: Any) -> None:
    pytest.importorskip("transformers")
    from quernel.models import PairConnectForCausalLM

    model, ids = made(), ids_of()
    wrapped = PairConnectForCausalLM.of(model)
    wanted = model.generate(ids, 12)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(wrapped.generate(ids, **options), wanted)
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, : T - 3] = False  # a shorter prompt, padded on the left
    got = wrapped.generate(ids, attention_mask=mask.long(), **options)
    assert torch.equal(got, model.generate(ids, 12, mask))
    out = wrapped(ids, labels=ids)
    by_hand = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, by_hand)
    wrapped.save_pretrained(tmp_path)
    twin = PairConnectForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(twin.generate(ids, **options), wanted)
    beams = wrapped.generate(ids, num_beams=2, **options)
    assert beams.shape == wanted.shape
