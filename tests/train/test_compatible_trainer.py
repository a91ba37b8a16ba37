"""``CompatibleTrainer``: an old gallery stays searchable, the old model stays as it is, refusals before training."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from quernel import data
from quernel._errors import QuernelError
from quernel.nn import SimplexHead
from quernel.search import FlatIndex, features_of
from quernel.train import CompatibleTrainer, HOCLoss, ReplayBuffer


def generated(n=60, d=6, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return torch.randn(n, d, generator=g) + 4 * torch.eye(d)[y], y


def net(width=8, d=6):
    return nn.Sequential(nn.Linear(d, width), nn.BatchNorm1d(width), nn.ReLU())


def digits(split, classes=10):
    held = data.load("digits", split=split)
    x, y = torch.from_numpy(held.x).float().flatten(1) / 16, torch.from_numpy(held.y)
    return x[y < classes], y[y < classes]


def trained_on_digits(width, seed, classes=10, map_=None, old=None, epochs=12):
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(64, width), nn.ReLU())
    head = SimplexHead(16, width, map_)
    rate = lambda p: torch.optim.AdamW(p, lr=1e-2)  # noqa: E731
    trainer = CompatibleTrainer(backbone, head, old=old, epochs=epochs, batch_size=64, seed=seed, optimizer=rate)
    return trainer.fit(digits("train", classes)).model


def test_a_gallery_of_the_old_model_stays_searchable_by_the_new_one():
    # The new model is wider, begins elsewhere, and never sees the old one: they share the simplex and its map only.
    old, new = trained_on_digits(32, 0), trained_on_digits(64, 1)
    x, y = digits("train")
    asked, wanted = digits("test")
    gallery = FlatIndex(15).add(features_of(old, x))
    stored = gallery.vectors.copy()
    own = (y[gallery.search(features_of(old, asked), 1)[1][:, 0]] == wanted).float().mean()
    cross = (y[gallery.search(features_of(new, asked), 1)[1][:, 0]] == wanted).float().mean()
    assert own > 0.9 and cross > 0.9
    assert np.array_equal(gallery.vectors, stored)
    # Under another map the same features mean other classes.
    moved = trained_on_digits(64, 1, map_=[(c + 3) % 10 for c in range(10)])
    assert (y[gallery.search(features_of(moved, asked), 1)[1][:, 0]] == wanted).float().mean() < 0.2


def test_higher_order_alignment_tells_old_samples_better_apart_than_cross_entropy_does():
    old = trained_on_digits(32, 0, epochs=4)
    asked, labels = digits("test")
    alone, aligned = (trained_on_digits(64, 1, old=o, epochs=4) for o in (None, old))
    before = features_of(old, asked)
    other = (labels[:, None] != labels).numpy()
    margins = []
    for model in (alone, aligned):
        cosines = features_of(model, asked) @ before.T
        margins.append(cosines.diagonal().mean() - cosines[other].mean())
    # Early in training all features share a direction, which cross-entropy is slow to leave: 0.50 against 0.67.
    assert margins[1] > margins[0] + 0.1


def test_the_old_model_is_not_touched_even_where_it_is_fine_tuned():
    x, y = generated()
    backbone, head = net(), SimplexHead(5, 8, [4, 3])
    old = CompatibleTrainer(backbone, head, epochs=2).fit((x[y < 2], y[y < 2])).model
    old.train()
    before = copy.deepcopy(old.state_dict())
    # The same backbone goes on: what is frozen is a copy.
    trainer = CompatibleTrainer(backbone, head.extended([4, 3, 2]), old=old, epochs=2).fit((x, y))
    assert all(not p.requires_grad and p.grad is None for p in trainer.old.parameters())
    assert all(not module.training for module in trainer.old.modules())
    for key, value in trainer.old.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not torch.equal(backbone[1].running_mean, before["0.1.running_mean"])
    other = net()
    twin = copy.deepcopy(old)
    CompatibleTrainer(other, SimplexHead(5, 8, [4, 3, 2]), old=twin).fit((x, y))
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), old.state_dict().values(), strict=True))
    assert twin.training and all(p.requires_grad for p in twin.parameters())


def test_the_seed_decides_the_batches_and_the_global_generator_does_not():
    torch.manual_seed(5)
    start = net()
    states, losses = [], []
    for seed in (0, 0, 1):
        state = torch.get_rng_state()
        head = SimplexHead(5, 8, [0, 1, 2], generator=torch.Generator().manual_seed(0))
        seen: list[tuple[int, int, float]] = []
        trainer = CompatibleTrainer(
            copy.deepcopy(start), head, memory=ReplayBuffer(4), epochs=2, batch_size=16, seed=seed,
            progress=lambda *step, seen=seen: seen.append(step),
        )  # fmt: skip
        trainer.fit(generated())
        trainer.fit(generated())
        assert torch.equal(state, torch.get_rng_state())
        assert [s[:2] for s in seen] == [*((i, 8) for i in range(1, 9)), *((i, 16) for i in range(1, 17))]
        assert trainer.steps == 24 and not trainer.model.training
        states.append(trainer.model.state_dict())
        losses.append([s[2] for s in seen])
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_the_memory_gets_each_task_and_is_trained_on_with_the_next():
    x, y = generated(90)
    memory = ReplayBuffer(5)
    head = SimplexHead(5, 8, [0, 1, 2])
    options = {"batch_size": 16, "epochs": 30, "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2)}
    trainer = CompatibleTrainer(net(), head, memory=memory, **options)
    trainer.fit((x[y < 2], y[y < 2]))
    assert torch.bincount(memory.items()[1]).tolist() == [5, 5]
    trainer.fit((x[y == 2], y[y == 2]))
    assert torch.bincount(memory.items()[1]).tolist() == [5, 5, 5]
    with torch.no_grad():
        kept = float((head.predict(trainer.model(x)[0]) == y)[y < 2].float().mean())
    forgetful = CompatibleTrainer(net(), SimplexHead(5, 8, [0, 1, 2]), **options)
    forgetful.fit((x[y < 2], y[y < 2])).fit((x[y == 2], y[y == 2]))
    with torch.no_grad():
        lost = float((head.predict(forgetful.model(x)[0]) == y)[y < 2].float().mean())
    assert kept > 0.9 > lost


def test_any_map_style_dataset_will_do():
    x, y = generated()

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return len(y)

        def __getitem__(self, i):
            return x[i], int(y[i])

    torch.manual_seed(0)
    start = net()
    made = []
    for dataset in (Pairs(), torch.utils.data.TensorDataset(x, y), (x, y)):
        head = SimplexHead(4, 8, generator=torch.Generator().manual_seed(0))
        made.append(CompatibleTrainer(copy.deepcopy(start), head).fit(dataset).model.state_dict())
    assert all(torch.equal(made[0][k], other[k]) for other in made[1:] for k in made[0])


def unchanged(trainer, dataset, message):
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(QuernelError, match=message):
        trainer.fit(dataset)
    assert trainer.steps == 0
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


def test_what_cannot_work_is_refused_before_training():
    x, y = generated()
    unchanged(CompatibleTrainer(net(), SimplexHead(4, 8, [0, 1])), (x, y), r"labels \[2\] have no prototype")
    unchanged(CompatibleTrainer(net(), SimplexHead(4)), (x, y), r"x must have shape \(\.\.\., 3\); got \(1, 8\)")
    unchanged(CompatibleTrainer(net(), SimplexHead(4, 8)), (x, y[:-1]), "a label a sample")
    unchanged(CompatibleTrainer(net(), SimplexHead(4, 8)), (x[:0], y[:0]), "at least one sample")
    unchanged(CompatibleTrainer(net(), SimplexHead(4, 8)), 5, "map-style|pair of tensors")
    memory = ReplayBuffer(2).add(x, y + 1)
    unchanged(CompatibleTrainer(net(), SimplexHead(4, 8, [0, 1, 2]), memory=memory), (x, y), r"labels \[3\] have no")

    class LogitsOnly(nn.Sequential):
        def forward(self, x):
            return super().forward(x)[0]

    old = LogitsOnly(net(), SimplexHead(4, 8))
    unchanged(CompatibleTrainer(net(), SimplexHead(4, 8), old=old), (x, y), r"old must return \(logits, features\)")


@pytest.mark.parametrize(
    ("old", "message"),
    [
        (lambda: nn.Sequential(net(), SimplexHead(5, 8)), "n_prototypes must be the same"),
        (lambda: nn.Sequential(net(), SimplexHead(4, 8, [1, 0])), "class_map must agree"),
        (lambda: net(), "one SimplexHead; Sequential has 0"),
        (lambda: nn.Sequential(net(), SimplexHead(4, 8), SimplexHead(4, 8)), "has 2"),
        (lambda: "old.pt", "old must be Module"),
    ],
)
def test_old_models_that_do_not_agree_are_refused(old, message):
    with pytest.raises(QuernelError, match=message):
        CompatibleTrainer(net(), SimplexHead(4, 8, [0, 1, 2]), old=old())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"memory_share": 1.0}, "no room for new samples"),
        ({"memory_share": 0.5, "batch_size": 1, "memory": ReplayBuffer(1)}, "no room for new samples"),
        ({"memory": []}, "memory must be ReplayBuffer"),
        ({"loss": nn.CrossEntropyLoss()}, "loss must be HOCLoss"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_that_cannot_be_right_are_refused(options, message):
    with pytest.raises(QuernelError, match=message):
        CompatibleTrainer(net(), SimplexHead(4, 8), **options)


def test_a_loss_that_is_not_finite_stops_the_training():
    x, y = generated()
    x[7] = torch.nan
    trainer = CompatibleTrainer(net(), SimplexHead(4, 8), loss=HOCLoss())
    with pytest.raises(QuernelError, match="the loss is nan at step 1"):
        trainer.fit((x, y))
    assert trainer.steps == 0
