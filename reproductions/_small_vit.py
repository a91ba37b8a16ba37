"""A small vision transformer for Fashion-MNIST, trained once and kept in the cache, and its fine-tuning.

A token every 4 x 4 pixels from overlapping patches (49 tokens), 4 blocks of width 128 with 4 heads, mean of the tokens,
0.54 M parameters.  Training and fine-tuning run in bfloat16 autocast on one schedule: AdamW, warm-up, cosine decay.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from _fashion_mnist import MEAN, SIDE, STD, fashion
from _fashion_mnist import accuracy as right_answers
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import load
from quernel._load import save_model
from quernel.models._cached import folder_of
from quernel.nn import collect_aux_loss

DIM, HEADS, BLOCKS, STRIDE, PATCH = 128, 4, 4, 4, 7
# Images a step of training, and of fine-tuning: more of the smaller steps learn more in the same time.
BATCH, FINETUNE_BATCH = 64, 32
WEIGHT_DECAY, SMOOTHING, WARM_UP = 0.05, 0.05, 0.05
# Images kept from the training set for choosing learning rates and thresholds; the test set only judges.
VALIDATION = 5000
RECIPE: dict[str, Any] = {"version": 2, "data": "fashion-mnist/train", "seed": 0, "steps": 2400, "rate": 1.5e-3}


class Attention(nn.Module):
    """Softmax self-attention with fused projections; x: (B, N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        # At 49 tokens the fused operation is slower, its backward pass by far.
        weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(DIM), Attention()
        self.norm2 = nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """(B, 28, 28) pixels in 0..1 -> (B, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, DIM, PATCH, stride=STRIDE, padding=PATCH // 2)
        self.position = nn.Parameter(0.02 * torch.randn((SIDE // STRIDE) ** 2, DIM))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed((x.unsqueeze(1) - MEAN) / STD).flatten(2).transpose(1, 2)  # (B, 49, C)
        tokens = self.blocks(patches + self.position)
        return self.head(self.norm(tokens).mean(1))


@functools.cache
def images(split: str) -> tuple[Tensor, Tensor]:
    """Return pixels in 0..1 and labels of "train" (55,000), "validation" (5,000) or "test" (10,000)."""
    x, y = fashion("test" if split == "test" else "train")
    x = x[:, 0]
    if split == "test":
        return x, y
    return (x[-VALIDATION:], y[-VALIDATION:]) if split == "validation" else (x[:-VALIDATION], y[:-VALIDATION])


def train(model: nn.Module, rate: float, steps: int, seed: int, batch: int = FINETUNE_BATCH) -> nn.Module:
    """Train in place on random batches of the training images and return the model in eval mode."""
    x, y = images("train")
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the routers' noise
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY, fused=True)
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(1 + steps * batch // len(x))])
    model.train()
    for step in range(steps):
        share = step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(share / WARM_UP + 1 / steps, (1 + math.cos(math.pi * share)) / 2)
        rows = order[step * batch : (step + 1) * batch]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x[rows])
        loss = F.cross_entropy(logits.float(), y[rows], label_smoothing=SMOOTHING) + collect_aux_loss(model)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, split: str = "test") -> float:
    """Return the percentage of right answers in float32."""
    return right_answers(model.eval(), *images(split))


def cached(name: str, recipe: dict[str, Any], make: Callable[[], nn.Module]) -> nn.Module:
    """Return the model of a recipe from the cache, made now (minutes) where it is absent."""
    folder = folder_of(f"reproduction-{name}", recipe)
    if not folder.is_dir():
        start = time.process_time()
        save_model(make(), folder, extra={"recipe": recipe, "seconds": time.process_time() - start})
    return load(folder, model=SmallViT)


def dense() -> nn.Module:
    """Return the trained transformer."""

    def make() -> nn.Module:
        torch.manual_seed(RECIPE["seed"])
        return train(SmallViT(), RECIPE["rate"], RECIPE["steps"], RECIPE["seed"], BATCH)

    return cached("small-vit", RECIPE, make)
