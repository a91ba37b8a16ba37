"""What each operation does to channels; an operation that is not listed here blocks what it reads.

A rule takes the flow, the node and its operands by name, and returns the axes of the result.  "Bending"
marks pointwise operations that are not positively homogeneous (f(2z) != 2 f(z)).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from quernel.compress.graph._flow import Axes, Flow, Ids, Rule, all_axes, operation_name, shape, untracked

Operands = dict[str, Any]


def module_of(tensor: str) -> str:
    """Return the module that owns a tensor: "fc.weight" -> "fc"."""
    return tensor.rpartition(".")[0]


def unknown(flow: Flow, node: fx.Node, a: Operands) -> Any:
    """Block every channel that an operation reads."""
    for operand in node.all_input_nodes:
        flow.block(
            all_axes(flow, operand), f"passes through {operation_name(node)}, which may tie its channels together"
        )
    return untracked(node)


def _linear(flow: Flow, node: fx.Node, a: Operands) -> Axes:
    x = flow.axes(a["input"])
    rows = _dense(flow, a["weight"], a["bias"], x[-1])
    if a["bias"] is not None:
        flow.bend(x[:-1], "linear")
    return (*x[:-1], rows)


def _conv(flow: Flow, node: fx.Node, a: Operands) -> Axes:
    x = flow.axes(a["input"])
    spatial = len(shape(a["weight"])) - 2
    channel = len(x) - spatial - 1
    out, per_group = shape(a["weight"])[:2]
    groups, name = a["groups"], module_of(flow.tensor(a["weight"]) or "a computed weight.")
    flow.block(x[channel + 1 :], f"is convolved over by '{name}'")
    ids: Ids | None
    if groups == 1:
        ids = _dense(flow, a["weight"], a["bias"], x[channel])
    elif per_group == 1 and out == groups:
        ids = _depthwise(flow, a["weight"], a["bias"], x[channel])
    else:
        reason = f"meets the grouped convolution '{name}' (groups={groups})"
        flow.block((x[channel],), reason)
        ids = _dense(flow, a["weight"], a["bias"], None)
        flow.block((ids,), reason)
    return (*x[:channel], ids, *(None,) * spatial)


def _dense(flow: Flow, weight: fx.Node, bias: fx.Node | None, columns: Ids | None) -> Ids:
    rows = flow.new(shape(weight)[0])
    name = flow.tensor(weight)
    if name is None:
        flow.block((columns, rows), "meets a weight that is computed on the fly")
        return rows
    flow.call(name)
    flow.use(name, 0, "row", rows)
    flow.use(name, 1, "column", columns)
    if bias is not None:
        _vector(flow, bias, "row", rows)
    return rows


def _depthwise(flow: Flow, weight: fx.Node, bias: fx.Node | None, ids: Ids | None) -> Ids | None:
    name = flow.tensor(weight)
    if name is None:
        flow.block((ids,), "meets a weight that is computed on the fly")
        return ids
    flow.call(name)
    flow.use(name, 0, "gain", ids)
    if bias is not None:
        _vector(flow, bias, "shift", ids)
    return ids


def _vector(flow: Flow, vector: fx.Node, role: Any, ids: Ids | None) -> None:
    name = flow.tensor(vector)
    if name is None:
        flow.block((ids,), "meets a vector that is computed on the fly")
    else:
        flow.call(name)
        flow.use(name, 0, role, ids)


def _batch_norm(flow: Flow, node: fx.Node, a: Operands) -> Axes:
    x = flow.axes(a["input"])
    mean = flow.tensor(a["running_mean"])
    if mean is None or a["training"]:
        flow.block(x, "meets a batch norm that uses the statistics of the batch")
        return x
    name = module_of(mean)
    flow.call(mean)
    for vector in (a["weight"], a["bias"]):
        if vector is not None and flow.tensor(vector) is None:
            flow.block((x[1],), "meets a vector that is computed on the fly")
    source: Any = a["input"]
    layer = operation_name(source) in ("linear", "conv1d", "conv2d", "conv3d") and len(source.users) == 1
    weight = flow.tensor(source.args[1]) if layer else None
    # Features are axis 1 only of batched convolutions, (N, C, *S), and of linear layers on (N, C).
    foldable = weight is not None and len(x) == len(shape(source.args[1]))
    if foldable and weight is not None:
        flow.folds[name] = module_of(weight)
    # Even without affine parameters the fold or the merge acts through these two names.
    flow.use(f"{name}.weight", 0, "folded" if foldable else "gain", x[1])
    flow.use(f"{name}.bias", 0, "folded" if foldable else "shift", x[1])
    return x


def _same(flow: Flow, node: fx.Node, a: Operands) -> Axes:
    return flow.axes(node.all_input_nodes[0])


def _checked(flow: Flow, node: fx.Node, a: Operands) -> Axes:
    """Let pass what the export only asserts, beside every change of dtype: it hands nothing on."""
    return untracked(node)


def _bent(flow: Flow, node: fx.Node, a: Operands) -> Axes:
    x = flow.axes(node.all_input_nodes[0])
    flow.bend(x, operation_name(node))
    return x


def _pointwise(flow: Flow, node: fx.Node, a: Operands) -> Axes:
    """Join operands that broadcast against each other, e.g. a residual addition."""
    operation, out = operation_name(node), shape(node)
    operands = {name: flow.axes(o) for name in ("self", "other") if isinstance(o := a.get(name), fx.Node)}
    shapes = {name: shape(a[name]) for name in operands}
    result: list[Ids | None] = []
    for back in range(len(out), 0, -1):
        full = [name for name in operands if len(shapes[name]) >= back and shapes[name][-back] == out[-back] > 1]
        tracked = {name: ids for name in full if (ids := operands[name][-back]) is not None}
        here = tuple(tracked.values())
        flow.equal += [(here[0], other) for other in here[1:]]
        if 0 < len(here) < len(full):
            flow.block(here, f"meets, in {operation}, a tensor whose channels are fixed")
        offset = operation in ("add", "sub", "rsub", "maximum", "minimum") and len(full) < 2
        product = operation in ("mul", "div") and len(here) == 2
        if offset or product or operation == "pow" or (operation == "div" and "other" in tracked):
            flow.bend(here, operation)
        result.append(here[0] if here else None)
    return tuple(result)


def _cat(flow: Flow, node: fx.Node, a: Operands) -> Axes:
    operands = [o for o in a["tensors"] if len(shape(o)) == len(shape(node))]
    pieces = [flow.axes(o) for o in operands]
    dim = a["dim"] % len(shape(node))
    result = list(pieces[0])
    for i in range(len(result)):
        tracked = [p[i] for p in pieces if p[i] is not None]
        if i == dim and tracked:
            sizes = [shape(o)[dim] for o in operands]
            filled = [_fixed(flow, n) if p[i] is None else p[i] for p, n in zip(pieces, sizes, strict=True)]
            result[i] = np.concatenate(filled)  # type: ignore[arg-type]
        elif tracked:
            flow.equal += [(tracked[0], other) for other in tracked[1:]]  # type: ignore[misc]
            if len(tracked) < len(pieces):
                flow.block(tuple(tracked), "is joined with a tensor whose channels are fixed")
            result[i] = tracked[0]
    return tuple(result)


def _fixed(flow: Flow, n: int) -> Ids:
    ids = flow.new(n)
    flow.block((ids,), "is fixed: an input or a constant")
    return ids


def _pool(flow: Flow, node: fx.Node, a: Operands) -> Any:
    x = flow.axes(node.all_input_nodes[0])
    spatial = int(next(c for c in operation_name(node) if c.isdigit()))
    flow.block(x[-spatial:], f"is resized over by {operation_name(node)}")
    result = (*x[:-spatial], *(None,) * spatial)
    several = isinstance(node.meta["val"], tuple | list)
    return [result, (None,) * len(result)] if several else result


def _reduce(flow: Flow, node: fx.Node, a: Operands) -> Axes:
    x = flow.axes(a["self"])
    dims = a.get("dim")
    dims = range(len(x)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = {d % len(x) for d in dims}
    flow.block(tuple(x[d] for d in reduced), f"is reduced over by {operation_name(node)}")
    keep = a.get("keepdim", False)
    return tuple(None if i in reduced else ids for i, ids in enumerate(x) if keep or i not in reduced)


def _layer_norm(flow: Flow, node: fx.Node, a: Operands) -> Axes:
    x = flow.axes(a["input"])
    n = len(a["normalized_shape"])
    kind = operation_name(node).removeprefix("fused_")
    flow.block(x[-n:], f"is normalised over by {kind}")
    flow.bend(x[:-n], kind)
    return (*x[:-n], *(None,) * n)


def _reshape(flow: Flow, node: fx.Node, a: Operands) -> Axes:
    """Split both shapes into runs of equal product; a run with channels is re-read as a grid of ids."""
    operand = node.all_input_nodes[0]
    x, before, after = flow.axes(operand), shape(operand), shape(node)
    result: list[Ids | None] = [None] * len(after)
    for left, right in _runs(before, after):
        tracked = [d for d in left if x[d] is not None and before[d] > 1]
        if not tracked:
            continue
        grid = None
        if len(tracked) == 1:
            d = tracked[0]
            view = [before[i] if i == d else 1 for i in left]
            full = np.broadcast_to(x[d].reshape(view), [before[i] for i in left])  # type: ignore[union-attr]
            grid = full.reshape([after[i] for i in right])
        axis = None if grid is None else _only_axis(grid)
        if grid is None or axis is None:
            flow.block(tuple(x[d] for d in tracked), "is reshaped across its channels")
        else:
            result[right[axis]] = np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)[:, 0].copy()
    return tuple(result)


def _runs(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    runs = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        p = before[i] if left else 1
        q = after[j] if right else 1
        i, j = i + len(left), j + len(right)
        while p != q:
            if p < q:
                p, i = p * before[i], i + 1
                left.append(i - 1)
            else:
                q, j = q * after[j], j + 1
                right.append(j - 1)
        runs.append((left, right))
    return runs


def _only_axis(grid: Ids) -> int | None:
    """Return the one axis along which ids vary, or None if there are several."""
    varying = [d for d in range(grid.ndim) if grid.shape[d] > 1 and (np.diff(grid, axis=d) != 0).any()]
    return varying[0] if len(varying) == 1 else None


def _permute(flow: Flow, node: fx.Node, a: Operands) -> Axes:
    x = flow.axes(a["self"])
    operation = operation_name(node)
    order = list(range(len(x)))
    if operation == "permute":
        order = [d % len(x) for d in a["dims"]]
    elif operation in ("t", "numpy_T"):
        order.reverse()
    else:
        i, j = (int(d) % len(x) for d in node.args[1:3])  # type: ignore[arg-type]
        order[i], order[j] = j, i
    return tuple(x[d] for d in order)


def _expand(flow: Flow, node: fx.Node, a: Operands) -> Axes:
    x, before, after = flow.axes(a["self"]), shape(a["self"]), shape(node)
    new = len(after) - len(before)
    return (*(None,) * new, *(ids if before[i] == after[new + i] else None for i, ids in enumerate(x)))


def _part(flow: Flow, node: fx.Node, a: Operands) -> Any:
    """Slices and splits: their bounds are written into the forward, so the axis must keep its width."""
    x, before = flow.axes(a["self"]), shape(a["self"])
    d = a.get("dim", 0) % len(x)
    value = node.meta["val"]
    if not isinstance(value, tuple | list) and shape(node) == before:
        return x
    flow.block((x[d],), f"is cut by {operation_name(node)}")
    one = tuple(None if i == d else ids for i, ids in enumerate(x))
    if operation_name(node) in ("select", "unbind"):
        one = (*one[:d], *one[d + 1 :])
    return [one] * len(value) if isinstance(value, tuple | list) else one


def _pad(flow: Flow, node: fx.Node, a: Operands) -> Axes:
    x = flow.axes(node.all_input_nodes[0])
    amounts = a.get("pad", a.get("padding")) or ()
    changed = {len(x) - 1 - i // 2 for i, n in enumerate(amounts) if n != 0}
    flow.block(tuple(x[d] for d in changed), "is padded with constant channels")
    if a.get("value"):
        flow.bend(tuple(ids for d, ids in enumerate(x) if d not in changed), "pad")
    return tuple(None if d in changed else ids for d, ids in enumerate(x))


def _getitem(flow: Flow, node: fx.Node, a: Operands) -> Any:
    value = flow.values[node.all_input_nodes[0]]
    return value[node.args[1]] if isinstance(value, list) else untracked(node)  # type: ignore[index]


def _table(*entries: tuple[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in entries for name in names.split()}


RULES = _table(
    (_linear, "linear"),
    (_conv, "conv1d conv2d conv3d"),
    (_batch_norm, "batch_norm"),
    (
        _same,
        "relu leaky_relu abs neg dropout feature_dropout clone contiguous detach alias to _to_copy lift_fresh_copy",
    ),
    (_same, "type_as"),
    (_checked, "_assert_tensor_metadata"),
    (_bent, "gelu silu sigmoid tanh hardswish hardsigmoid hardtanh relu6 elu selu celu softplus mish log_sigmoid"),
    (_bent, "clamp clamp_min clamp_max exp log sqrt rsqrt square reciprocal sin cos erf softsign"),
    (_pointwise, "add sub rsub mul div maximum minimum pow"),
    (_cat, "cat concat concatenate"),
    (_pool, "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices"),
    (_pool, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d"),
    (_pool, "upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_nearest3d"),
    (_reduce, "mean sum amax amin"),
    (_layer_norm, "layer_norm rms_norm _fused_rms_norm"),
    (_reshape, "view reshape _unsafe_view flatten unflatten unsqueeze squeeze view_as reshape_as"),
    (_permute, "permute transpose t numpy_T swapaxes swapdims"),
    (_expand, "expand expand_as"),
    (_part, "slice narrow chunk split split_with_sizes tensor_split unbind select"),
    (_pad, "pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"),
    (_getitem, "getitem"),
)
