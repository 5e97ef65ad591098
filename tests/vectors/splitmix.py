"""Split-Mix's official state dicts as this library's nets and trees."""

import re

import jax.numpy as jnp
import numpy as np

from hetfl_jax.models import AlexNet, DigitsCNN, PreResNet, families

FULL = {DigitsCNN: (64, 64, 128, 2048, 512), AlexNet: (64, 192, 384, 256, 256, 4096, 4096)}
STATS = {"running_mean": "mean", "running_var": "var"}


def kind(names):
    """The class of the net that has parameters of these names."""
    if any("layer1" in name for name in names):
        return PreResNet
    return AlexNet if any("features" in name or "classifier" in name for name in names) else DigitsCNN


def _layer(net, name):
    """Our name of an official layer."""
    if net is PreResNet:
        layer = {"conv1": "stem", "bn4": "norm", "n4": "norm", "linear": "head"}.get(name, name)
        if found := re.fullmatch(r"layer(\d)\.(\d+)\.(\w+)", layer):
            part = re.sub(r"^b?n(\d)", r"norm\1", found[3])
            layer = f"stage{int(found[1]) - 1}_block{found[2]}_{part}"
        return layer
    part, number = re.fullmatch(r"(?:features\.|classifier\.)?(conv|bn|fc)(\d)", name).groups()
    convs = 3 if net is DigitsCNN else 5
    if part == "fc":
        return "head" if number == "3" else f"dense_{convs + int(number) - 1}"
    return f"{'conv' if part == 'conv' else 'norm'}_{int(number) - 1}"


def to_tree(arrays):
    """Official arrays as variables; the clean branch of a norm of two is row 0, the noise branch row 1."""
    net, out, rows = kind(arrays), {}, {}
    for name, value in arrays.items():
        if name.endswith("num_batches_tracked"):
            continue
        *parents, leaf = name.split(".")
        branch = parents.pop() if parents[-1] in ("clean_bn", "noise_bn") else None
        layer = _layer(net, ".".join(parents))
        moved = {4: lambda v: v.transpose(2, 3, 1, 0), 2: lambda v: v.T}.get(value.ndim, lambda v: v)(value)
        weight = "scale" if "norm" in layer else "kernel"
        collection, leaf = (
            ("batch_stats", STATS[leaf]) if leaf in STATS else ("params", {"weight": weight}.get(leaf, leaf))
        )
        place = out.setdefault(collection, {}).setdefault(layer, {})
        if branch:
            rows.setdefault((collection, layer, leaf), {})[branch] = moved
            moved = np.stack(list(rows[collection, layer, leaf].values()))
            assert list(rows[collection, layer, leaf]) in (["clean_bn"], ["clean_bn", "noise_bn"])
        place[leaf] = jnp.asarray(moved)
    return out


def bases(arrays, count=None):
    """The official bases ``B.NAME``, one tree a base."""
    numbers = sorted({name.split(".", 1)[0] for name in arrays}, key=int)
    own = lambda b: {name.split(".", 1)[1]: value for name, value in arrays.items() if name.startswith(f"{b}.")}  # noqa: E731
    return [to_tree(own(b)) for b in numbers[:count]]


def family(arrays, image, width=1.0, levels=({"width": 1.0},), **fields):
    """The family of one official net, whose size is the share ``width`` of the full one; rescaled if it is below 1."""
    net, params = kind(arrays), to_tree(arrays)["params"]
    classes = params["head"]["kernel"].shape[1]
    if net is PreResNet:
        stages = sorted(
            {re.match(r"stage(\d)_block(\d)", name).groups() for name in params if name.startswith("stage")}
        )
        hidden = tuple(params[f"stage{s}_block0_conv2"]["kernel"].shape[3] for s in range(4))
        fields |= {"blocks": tuple(sum(s == str(i) for s, _ in stages) for i in range(4)), "scales_convolutions": True}
    else:
        layers = [name for name in params if name.startswith(("conv_", "dense_"))]
        hidden = tuple(params[name]["kernel"].shape[-1] for name in sorted(layers, key=lambda n: int(n[-1])))
    made = {"scaler": False, "init_rate": width, "layer_rate": width, **fields}
    module = net(hidden=hidden, classes=classes, **made)
    return families.family(module, levels, jnp.zeros((1, *image)))
