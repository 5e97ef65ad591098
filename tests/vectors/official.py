"""HeteroFL's official state dicts as this library's nets and trees."""

import math
import re

import jax.numpy as jnp
import numpy as np

from hetfl_jax.models import Conv, PreResNet, families


def _path(name: str, convs: int) -> tuple[str, str]:
    """Where an official parameter lives: (layer, leaf)."""
    if found := re.fullmatch(r"blocks\.(\d+)\.(\w+)", name):
        number, leaf = int(found[1]), found[2]
        layer = "head" if number % 5 == 1 else f"{'conv' if number % 5 == 0 else 'norm'}_{number // 5}"
    else:
        layer, leaf = name.rsplit(".", 1)
        layer = {"conv1": "stem", "n4": "norm", "linear": "head"}.get(layer, layer)
        if found := re.fullmatch(r"layer(\d)\.(\d+)\.(\w+)", layer):
            part = found[3].replace("n1", "norm1").replace("n2", "norm2") if found[3][0] == "n" else found[3]
            layer = f"stage{int(found[1]) - 1}_block{found[2]}_{part}"
    kernel = "scale" if "norm" in layer else "kernel"
    return layer, {"weight": kernel, "running_mean": "mean", "running_var": "var"}.get(leaf, leaf)


def to_tree(arrays: dict[str, np.ndarray]) -> dict:
    """Official arrays as a nested dict: convolutions HWIO, linear weights [in, out]."""
    out: dict = {}
    for name, value in arrays.items():
        if name.endswith("num_batches_tracked"):
            continue
        layer, leaf = _path(name, len(arrays))
        moved = {4: lambda v: v.transpose(2, 3, 1, 0), 2: lambda v: v.T}.get(value.ndim, lambda v: v)(value)
        out.setdefault(layer, {})[leaf] = jnp.asarray(moved)
    return out


def images(x: np.ndarray) -> jnp.ndarray:
    """NCHW to NHWC."""
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def family(params: dict[str, np.ndarray], hidden: np.ndarray, rates, image: tuple[int, int, int], **fields):
    """A family whose level 0 is the official global model and whose level 1 + i has ``rates[i]``."""
    full, rate = _global_rate(params, hidden)
    classes = next(
        v.shape[0] for k, v in params.items() if k.endswith(("linear.weight", "blocks.21.weight")) or _is_head(k)
    )
    if "conv1.weight" in params:
        stages = [int(m[1]) for m in (re.match(r"layer(\d)\.\d+\.conv1", k) for k in params) if m]
        module = PreResNet(hidden=full, blocks=tuple(np.bincount(stages)[1:].tolist()), classes=classes, **fields)
    else:
        module = Conv(hidden=full, classes=classes, **fields)
    levels = [{"width": 1.0}] + [{"width": float(r) / rate} for r in rates]
    return families.family(module, levels, jnp.zeros((1, *image)))


def _is_head(name: str) -> bool:
    found = re.fullmatch(r"blocks\.(\d+)\.weight", name)
    return bool(found) and int(found[1]) % 5 == 1


def _global_rate(params: dict[str, np.ndarray], hidden: np.ndarray) -> tuple[tuple[int, ...], float]:
    """Channels of the global model, and its rate: the one that turns ``hidden`` into the first layers' widths."""
    if "conv1.weight" in params:
        names = [f"layer{i + 1}.0.conv1.weight" for i in range(len(hidden))]
    else:
        names = [f"blocks.{5 * i}.weight" for i in range(len(hidden))]
    full = tuple(params[name].shape[0] for name in names)
    for rate in (1.0, 0.5, 0.25, 0.125, 0.0625):
        if full == tuple(math.ceil(int(h) * rate) for h in hidden):
            return full, rate
    raise AssertionError(f"no rate turns {hidden} into {full}")
