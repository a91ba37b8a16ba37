"""The contract of token mixers: checks of inputs, masks, states, the registry, surgery, blocks; damage is found."""

from __future__ import annotations

import copy
import inspect
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import catalogue
from quernel.nn import (
    ChannelsFirst,
    DropPath,
    H3Conv,
    HyperZZWLocal,
    LongConv,
    LSConv,
    MetaBlock,
    Mixer,
    NeighborhoodAttention1d,
    NormAwareLinearAttention,
    SGConv,
    SoftmaxAttention,
    make_mixer,
    mixer_names,
    replace_modules,
)
from quernel.nn.functional import fold_batch_norm
from quernel.testing import ConformanceError, check_mixer
from quernel.testing.mixers import CHECKS

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Mean(Mixer):
    """The mean of the kept tokens: a mixer of one line."""

    options: ClassVar[tuple[str, ...]] = ()

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        kept = x.new_ones(x.shape[:-1]) if mask is None else mask.to(x.dtype)
        axes = tuple(range(1, x.ndim - 1))
        return (x.sum(axes, keepdim=True) / kept.sum(axes)[(..., *[None] * (x.ndim - 1))]).expand_as(x)

    def flops(self, shape: tuple[int, ...]) -> int:
        return int(torch.Size(shape).numel())


def registered(cls: type, **example: Any) -> type:
    cls._quernel_contract = "mixer"
    cls._quernel_example = staticmethod(
        lambda: {"make": lambda: cls(4), "input": lambda g: (torch.randn(2, 6, 4, generator=g),), **example}
    )
    return cls


@pytest.mark.parametrize(
    "name", ["shapes", "no_tokens", "masks", "causality", "steps", "parameters_count", "fuse", "groups", "refusals"]
)
def test_a_right_mixer_passes_the_checks_of_mixers(name: str) -> None:
    CHECKS[name](registered(type("Right", (Mean,), {})))


def wrong(**members: Any) -> type:
    return registered(type("Wrong", (Mean,), members))


def _with_a_gate(self: Any, dim: int, gate: bool = True) -> None:
    Mixer.__init__(self, dim)
    self.gate = bool(gate)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("masks", wrong(_mix=lambda self, x, mask: x.mean(1, keepdim=True).expand_as(x))),
        ("shapes", wrong(_mix=lambda self, x, mask: x.narrow(1, 0, 1))),
        ("no_tokens", wrong(forward=lambda self, x, mask=None, state=None: x.mean(1, keepdim=True))),
        ("causality", wrong(causal=True)),
        ("fuse", wrong(fuse=lambda self: nn.Identity())),
        ("groups", wrong(flops=lambda self, shape: 0)),
        ("refusals", wrong(_check=lambda self, x: None)),
        ("refusals", wrong(forward=lambda self, x, mask=None, state=None: self._check(x) or x)),
        ("refusals", wrong(options=("gate",), __init__=_with_a_gate)),
    ],
)
def test_a_wrong_mixer_is_found(name: str, cls: type) -> None:
    with pytest.raises(ConformanceError):
        CHECKS[name](cls)


def test_a_wrong_recurrence_is_found() -> None:
    class Forgetful(SoftmaxAttention):
        def __init__(self, dim: int) -> None:
            super().__init__(dim, 2, causal=True)

        def _continue(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            y, _ = super()._continue(x, state)
            return y, state

    with pytest.raises(ConformanceError, match="token by token"):
        CHECKS["steps"](registered(Forgetful))


def test_check_mixer_is_the_suite_of_the_contract() -> None:
    with pytest.raises(ConformanceError):
        check_mixer(wrong(_mix=lambda self, x, mask: x.narrow(1, 0, 1)))


def test_attention_is_its_definition() -> None:
    mixer, x = SoftmaxAttention(8, 2, causal=True).double(), draw(2, 5, 8).double()
    q, k, v = mixer.qkv(x).view(2, 5, 3, 2, 4).unbind(2)  # (B, N, H, D)
    wanted = torch.zeros(2, 5, 2, 4, dtype=torch.float64)
    for b in range(2):
        for h in range(2):
            for i in range(5):
                weights = torch.softmax(torch.stack([q[b, i, h] @ k[b, j, h] / 2 for j in range(i + 1)]), 0)
                wanted[b, i, h] = sum(w * v[b, j, h] for j, w in enumerate(weights))
    torch.testing.assert_close(mixer(x), mixer.proj(wanted.flatten(2)))


def test_masked_tokens_hold_anything() -> None:
    mixer, x = SoftmaxAttention(8, 2), draw(1, 4, 8)
    mask = torch.tensor([[True, True, True, False]])
    x[0, 3] = float("nan")
    torch.testing.assert_close(mixer(x, mask=mask)[:, :3], mixer(x[:, :3]), **CLOSE)
    assert mixer(x, mask=torch.zeros_like(mask)).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(draw(2, 3, 4, 5)), r"x must have shape \(B, \*S, 8\)"),
        (lambda m: m(draw(2, 8, 4, 5)), "Wrap the mixer in ChannelsFirst"),
        (lambda m: m(draw(2, 3, 8), mask=torch.zeros(2, 3)), r"^mask must be bool, .* Pass mask.bool\(\) .* mask == 0"),
        (lambda m: m(draw(2, 3, 8), mask=torch.ones(2, 3).long()), "^mask must be bool"),
        (lambda m: SoftmaxAttention(8, 2, causal="no"), "^causal must be True or False; got 'no'"),
        (lambda m: SoftmaxAttention(8, 2, qkv_bias=1), "^qkv_bias must be True or False; got 1"),
        (lambda m: m(draw(2, 8)), "x must have shape"),
        (lambda m: m(draw(2, 3, 8).int()), "x must hold real floating-point numbers; got torch.int32"),
        (lambda m: m(draw(2, 3, 8).cfloat()), "x must hold real floating-point"),
        (lambda m: m([[1.0]]), "x must be Tensor"),
        (lambda m: m.step(draw(2, 8), None), "state must come from init_state"),
        (lambda m: m(draw(2, 3, 8), mask=torch.ones(2, 4, dtype=torch.bool)), r"mask must have shape \(2, 3\)"),
        (lambda m: m(draw(2, 3, 8), mask=[True]), "mask"),
        (lambda m: m(draw(2, 3, 8), state=(draw(2, 2, 0, 4),) * 2, mask=torch.ones(2, 3)), "mask cannot"),
        (lambda m: m.init_state(2), "causal=True"),
        (lambda m: m.step(draw(2, 1, 8), None), r"x must have shape \(B, C\)"),
        (lambda m: Mean(4).init_state(1), "no recurrent form"),
        (lambda m: Mean(0), "dim"),
        (lambda m: SoftmaxAttention(8, 3), "num_heads must divide dim=8"),
        (lambda m: make_mixer("attention", 8), "name must be one of .*softmax-attention"),
        (
            lambda m: make_mixer("hyperzzw", 8),
            "^size must be given for mixer 'hyperzzw', which takes size, mode='matmul'",
        ),
        (lambda m: make_mixer("HyperZZWLocal", 8, layers=1), "^kernel_size must be given for mixer 'HyperZZWLocal'"),
        (lambda m: make_mixer("lsnet", 8, heads=2), "mixer 'lsnet' has no option 'heads'; it takes "),
        (lambda m: MetaBlock(nn.Linear(8, 8)), "mixer"),
        (lambda m: MetaBlock(m, "resnet"), "style"),
        (lambda m: MetaBlock(m, eps=0.0), "eps"),
        (lambda m: DropPath(1.0), "p must be"),
        (lambda m: replace_modules(nn.Sequential(m), nn.Conv2d, lambda old: old), "match finds nothing"),
        (lambda m: replace_modules(m, SoftmaxAttention, lambda old: old), "name must be that of a submodule"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call(SoftmaxAttention(8, 2))


def test_limits_of_shape_and_length_are_checked() -> None:
    mixer = SoftmaxAttention(8, 2)
    mixer.fixed_shape = (2, 3)
    with pytest.raises(QuernelError, match=r"spatial shape \(2, 3\)"):
        mixer(draw(1, 3, 2, 8))
    mixer.fixed_shape, mixer.max_len = None, 5
    with pytest.raises(QuernelError, match="at most 5 tokens"):
        mixer(draw(1, 3, 2, 8))


def test_make_mixer_knows_systems_and_classes() -> None:
    assert "softmax-attention" in mixer_names()
    for name in ("softmax-attention", "SoftmaxAttention"):
        assert isinstance(make_mixer(name, 8, num_heads=2), SoftmaxAttention)


@pytest.mark.parametrize("name", mixer_names())
def test_make_mixer_leaves_every_system_buildable(name: str) -> None:
    needed: dict[str, dict[str, Any]] = {
        "hyperzzw": {"size": 4},
        "long-conv": {"l_max": 9},
        "nalaformer": {"num_heads": 2},
        "neighborhood-attention": {"num_heads": 2, "kernel_size": 3},
        "sgconv": {"l_max": 9},
        "soft-attention": {"num_heads": 2},
        "softmax-attention": {"num_heads": 2},
    }
    made = make_mixer(name, 16, **needed.get(name, {}))
    assert isinstance(made, Mixer) and made.dim == 16


def test_replaced_modules_stay_shared_and_are_not_entered() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    made = []
    names = replace_modules(
        net, lambda name, m: isinstance(m, nn.Conv2d), lambda old: made.append(old) or ChannelsFirst(Mean(4))
    )
    assert names == ["0"] and made == [shared] and net[0] is net[2]
    outer = nn.Sequential(nn.Sequential(nn.Sequential(nn.ReLU())))
    assert replace_modules(outer, lambda name, m: name.startswith("0"), lambda old: nn.Identity()) == ["0"]


@pytest.mark.parametrize(("style", "norms", "scales"), [("metaformer", 2, 2), ("metanext", 1, 1), ("lsnet", 0, 1)])
def test_blocks_are_their_formulas(style: Any, norms: int, scales: int) -> None:
    block, x = MetaBlock(Mean(6), style, ls_init=0.5).eval(), draw(2, 3, 2, 6)
    assert (len(block.norms), len(block.scales)) == (norms, scales)
    mixer, mlp = block.mixer, block.mlp
    if style == "metaformer":
        y = x + 0.5 * mixer(block.norms[0](x))
        wanted = y + 0.5 * mlp(block.norms[1](y))
    elif style == "metanext":
        wanted = x + 0.5 * mlp(block.norms[0](mixer(x)))
    else:
        y = mixer(x)
        wanted = y + 0.5 * mlp(y)
    torch.testing.assert_close(block(x), wanted)


def test_the_batch_norm_of_tokens_folds_into_the_perceptron() -> None:
    block = MetaBlock(Mean(6), "metanext").train()
    for seed in range(5):
        block(draw(8, 3, 2, 6, seed=seed))
    block.eval()
    norm, x = block.norms[0], draw(2, 3, 2, 6)
    eye = torch.eye(6)
    weight, bias = fold_batch_norm(eye, None, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    torch.testing.assert_close(norm(x), x @ weight.T + bias, **CLOSE)


def test_drop_path_keeps_the_mean_and_whole_samples() -> None:
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(20_000, 2, 3)
    y = drop(x)
    kept = y[:, 0, 0] > 0
    assert ((y == 0).all((1, 2)) | (y == 1 / 0.75).all((1, 2))).all()
    # Six standard deviations of the share of a fair draw: a false alarm in 5e8.
    assert abs(float(kept.float().mean()) - 0.75) < 6 * (0.75 * 0.25 / 20_000) ** 0.5
    assert drop.eval()(x) is x


@pytest.mark.parametrize("style", ["metaformer", "metanext", "lsnet"])
def test_compressed_blocks_come_back_with_what_was_fused_in_them(style: Any, tmp_path: Any) -> None:
    from quernel import load
    from quernel.compress import CrossQuant, compress

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(MetaBlock(SoftmaxAttention(16, 2), style), HyperZZWLocal(16, 3, hidden=8)).eval()

    x = draw(4, 5, 5, 16)
    result = compress(net(), CrossQuant(), data=[x])
    result.save(tmp_path)
    with torch.no_grad():
        wanted = result.model(x)
        torch.testing.assert_close(load(tmp_path, model=net)(x), wanted, rtol=0, atol=0)


def test_a_folded_norm_inside_a_mixer_is_told(tmp_path: Any) -> None:
    from quernel._load import load, save_model

    net = nn.Sequential(HyperZZWLocal(4, 3, hidden=8)).eval()
    net[0].norm = nn.Identity()
    assert net[0].config()["replaced"]["norm"]["class"].endswith("Identity")
    x = draw(2, 5, 5, 4)
    save_model(net, tmp_path)
    twin = load(tmp_path, model=lambda: nn.Sequential(HyperZZWLocal(4, 3, hidden=8)))
    torch.testing.assert_close(twin(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("style", ["metaformer", "metanext"])
def test_a_block_keeps_the_eps_of_its_norms(style: Any) -> None:
    block = MetaBlock(SoftmaxAttention(8, 2), style, eps=1e-3)
    assert {norm.eps for norm in MetaBlock.from_config(block.config()).norms} == {1e-3}


@pytest.mark.parametrize("style", ["metaformer", "metanext", "lsnet"])
def test_a_block_fuses_its_mixer_and_stays_as_it_was(style: Any) -> None:
    torch.manual_seed(0)
    block, x = MetaBlock(LSConv(8), style, ls_init=0.5).train(), draw(2, 6, 6, 8)
    block(x)
    block.eval()
    before, fused = copy.deepcopy(block.state_dict()), block.fuse()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.mixer.lkp.modules())
    torch.testing.assert_close(fused(x), block(x), **CLOSE)
    assert list(before) == list(block.state_dict()) and not block.mixer.fused
    assert not {id(p) for p in fused.parameters()} & {id(p) for p in block.parameters()}
    twin = MetaBlock.from_config(fused.config()).eval()
    twin.load_state_dict(fused.state_dict())
    torch.testing.assert_close(twin(x), fused(x), rtol=0, atol=0)
    plain = MetaBlock(SoftmaxAttention(8, 2), style)
    assert plain.fuse() is plain
    with pytest.raises(QuernelError, match="call eval"):
        block.train().fuse()


def test_attention_mixers_count_their_heads_by_one_name() -> None:
    classes = [entry.resolve() for entry in catalogue() if entry.contract == "mixer"]
    among = [cls for cls in classes if cls.__module__.startswith("quernel.nn.attention.")]
    options = {cls.__name__: {*inspect.signature(cls).parameters} for cls in among}
    assert sum("num_heads" in names for names in options.values()) >= 6
    assert not [name for name, names in options.items() if names & {"heads", "n_heads"}]


def test_config_draws_nothing() -> None:
    block = MetaBlock(HyperZZWLocal(8, 3, hidden=8))
    state = torch.get_rng_state()
    block.config()
    assert torch.equal(state, torch.get_rng_state())


RECURRENT: list[tuple[Any, dict[str, Any]]] = [
    (SoftmaxAttention, {"num_heads": 2, "causal": True}),
    (NormAwareLinearAttention, {"num_heads": 2, "causal": True}),
    (NeighborhoodAttention1d, {"num_heads": 2, "kernel_size": 3, "is_causal": True}),
    (LongConv, {"l_max": 9}),
    (SGConv, {"l_max": 9}),
    (H3Conv, {"l_max": 9}),
]


@pytest.mark.parametrize(("kind", "options"), RECURRENT, ids=lambda value: getattr(value, "__name__", ""))
def test_a_state_begins_where_the_parameters_are(kind: Any, options: dict[str, Any]) -> None:
    mixer = kind(8, **options)
    for where in ("cpu", "meta"):
        state = mixer.to(where).init_state(2)
        assert {t.device.type for t in torch.utils._pytree.tree_leaves(state)} == {where}
    assert {t.device.type for t in torch.utils._pytree.tree_leaves(mixer.init_state(2, device="cpu"))} == {"cpu"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (SoftmaxAttention(8, 2, causal=True), SoftmaxAttention(8, 2)),
        (LongConv(8, 9), LongConv(8, 9, bidirectional=True)),
        (LongConv(8, 9), LongConv(8, 9, butterfly="learned")),
        (SGConv(8, 9), SGConv(8, 9, bidirectional=True)),
    ],
    ids=["softmax", "bidirectional", "learned", "sgconv"],
)
def test_what_is_not_causal_takes_no_state(before: Mixer, after: Mixer) -> None:
    with pytest.raises(QuernelError, match="has a recurrent form only with"):
        after(draw(2, 3, 8), state=before.init_state(2))
    with pytest.raises(QuernelError, match="has a recurrent form only with"):
        after.init_state(2)
