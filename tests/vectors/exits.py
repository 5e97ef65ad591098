"""DepthFL's official state dicts as this library's multi-exit ResNet."""

import re

import jax.numpy as jnp
import numpy as np

from hetfl_jax.models import build, families

_SEPARABLE = {0: "depthwise1", 1: "pointwise1", 2: "norm1", 4: "depthwise2", 5: "pointwise2", 6: "norm2"}


def place(name: str, levels: int) -> tuple[str, str, str]:
    """Where an official entry lives: (collection, layer, leaf)."""
    layer, leaf = name.replace(".norm.", ".").rsplit(".", 1)
    layer = {"conv1": "stem", "bn1": "stem_norm", "fc_layer": f"head{levels}"}.get(layer, layer)
    layer = layer.replace("middle_fc", "head")
    if found := re.fullmatch(r"layer(\d)\.(\d)\.(.*)", layer):
        part = {"downsample.0": "shortcut", "downsample.1": "shortcut_norm"}.get(found[3], found[3])
        layer = f"layer{found[1]}_block{found[2]}_{part.replace('bn', 'norm')}"
    elif found := re.fullmatch(r"scala(\d)\.(\d)\.operations\.(\d)", layer):
        layer = f"bottleneck{found[1]}_{found[2]}_{_SEPARABLE[int(found[3])]}"
    elif found := re.fullmatch(r"attention(\d)\.0\.operations\.(\d)", layer):
        layer = f"attention{found[1]}_{_SEPARABLE[int(found[2])]}"
    elif found := re.fullmatch(r"attention(\d)\.1", layer):
        layer = f"attention{found[1]}_norm"
    if leaf.startswith("running"):
        return "batch_stats", layer, {"running_mean": "mean", "running_var": "var"}[leaf]
    return "params", layer, {"weight": "scale" if "norm" in layer else "kernel"}.get(leaf, leaf)


def to_variables(arrays: dict[str, np.ndarray], levels: int) -> dict:
    """Official arrays as variables; the batch counters are left out."""
    out: dict = {}
    for name, value in arrays.items():
        if name.endswith("num_batches_tracked"):
            continue
        collection, layer, leaf = place(name, levels)
        moved = {4: lambda v: v.transpose(2, 3, 1, 0), 2: lambda v: v.T}.get(value.ndim, lambda v: v)(value)
        out.setdefault(collection, {}).setdefault(layer, {})[leaf] = np.asarray(moved)
    return out


def levels_in(arrays: dict[str, np.ndarray]) -> int:
    """Levels of the model that a state dict belongs to."""
    return max(int(found[1]) for found in (re.match(r"layer(\d)", name) for name in arrays) if found)


def level_of(name: str, levels: int) -> int:
    """The level, from 1, that an official entry belongs to."""
    found = re.match(r"(?:layer|middle_fc|scala|attention)(\d)", name)
    return int(found[1]) if found else levels if name.startswith("fc_layer") else 1


def family(arrays: dict[str, np.ndarray], image: tuple[int, int, int] = (32, 32, 3)):
    """The family of all depths, the deepest first, of the full model whose state is given."""
    levels = range(1, levels_in(arrays) + 1)
    return family_of(tuple(arrays[f"layer{level}.0.conv1.weight"].shape[0] for level in levels), arrays, image)


def family_of(hidden: tuple[int, ...], arrays: dict[str, np.ndarray], image: tuple[int, int, int]):
    """The same with the widths given, where the state is a prefix."""
    tracked = any(name.endswith("running_mean") for name in arrays)
    fields = {"norm": "bn_tracked"} if tracked else {"norm": "gn"}
    classes = arrays["middle_fc1.weight"].shape[0]
    module = build("resnet18_exits", hidden=hidden, classes=classes, **fields)
    return families.family(module, [{"depth": d} for d in range(len(hidden), 0, -1)], jnp.zeros((1, *image)))
