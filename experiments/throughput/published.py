"""The protocols by which others publish the speed of their simulators, as configs of ours.

    hetfl train --config=experiments/throughput/published.py:protocol=pfl

on the real data; ``experiments.throughput.accelerator`` times them on random data of the same shapes. Nets are theirs,
with dropout; learning rates do not matter for time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import numpy as np

from hetfl_jax.core.types import Array
from hetfl_jax.models.conv import lowered, max_pool
from hetfl_jax.models.digits import flattened
from hetfl_jax.run.config import changed, parse_arg


class Published(NamedTuple):
    """One protocol and what was published of it."""

    theirs: str  #: time that was published, "" for none
    hardware: str
    source: str
    shape: tuple[int, ...]
    examples: int  #: of the training set
    classes: int
    clients: int
    cohort: int
    batch: int
    epochs: int
    rounds: int
    rate: float
    net: str  #: class below
    data: str  #: source of the real data


PROTOCOLS = {
    "pfl": Published(
        "minutes in its Table 1; 7 to 72 times faster than six others", "one A100 40 GB",
        "Granqvist et al., NeurIPS 2024, arXiv:2404.06430; apple/pfl-research publications/pfl",
        (32, 32, 3), 50_000, 10, 1_000, 50, 10, 1, 1_500, 0.1, "Late", "tfds:cifar10",
    ),
    "pfllib": Published(
        "", "one RTX 3090 is named", "TsingZ0/PFLlib, README: main.py -data MNIST -m cnn -algo FedAvg -gr 2000",
        (28, 28, 1), 52_500, 10, 20, 20, 10, 1, 2_000, 0.005, "Early", "tfds:mnist",
    ),
    "fedjax": Published(
        "EMNIST in a few minutes", "TPU", "Ro et al., arXiv:2108.02117, abstract",
        (28, 28, 1), 340_000, 62, 3_400, 10, 20, 1, 1_500, 0.03, "Late", "tfds:emnist/byclass",
    ),
    "blazefl": Published(
        "a plot without figures", "one A100 40 GB, 12 cores", "blazefl/blazefl, docs/source/benchmark.rst",
        (32, 32, 3), 40_000, 10, 100, 100, 50, 5, 5, 0.1, "Tutorial", "tfds:cifar10",
    ),
}  # fmt: skip


def _conv(x: Array, features: int, kernel: int, name: str) -> Array:
    return nn.relu(nn.Conv(features, (kernel, kernel), padding="VALID", conv_general_dilated=lowered("auto"),
                           name=name)(x))  # fmt: skip


class Late(nn.Module):
    """conv 3x3 x 32, conv 3x3 x 64, pool, dropout 1/4, dense 128, dropout 1/2, linear: pfl-research's and FedJAX's."""

    classes: int = 10
    hidden: Sequence[int] = (32, 64, 128)

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """[B, H, W, I] -> [B, C]."""
        for i, features in enumerate(self.hidden[:2]):
            x = _conv(x, features, 3, f"conv_{i}")
        x = nn.Dropout(0.25, deterministic=not train)(flattened(max_pool(x)))
        x = nn.relu(nn.Dense(self.hidden[2], name="dense")(x))
        return nn.Dense(self.classes, name="head")(nn.Dropout(0.5, deterministic=not train)(x))


class Early(nn.Module):
    """Unpadded conv 5x5 and pool twice, then dense layers: PFLlib's ``FedAvgCNN``."""

    classes: int = 10
    hidden: Sequence[int] = (32, 64, 512)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, I] -> [B, C]."""
        for i, features in enumerate(self.hidden[:2]):
            x = max_pool(_conv(x, features, 5, f"conv_{i}"))
        x = flattened(x)
        for i, features in enumerate(self.hidden[2:]):
            x = nn.relu(nn.Dense(features, name=f"dense_{i}")(x))
        return nn.Dense(self.classes, name="head")(x)


class Tutorial(Early):
    """PyTorch's CIFAR-10 tutorial: ``Early`` with 6 and 16 channels, dense 120 and 84 (0.24 MB)."""

    hidden: Sequence[int] = (6, 16, 120, 84)


def get_config(arg: str = ""):
    arg = parse_arg(arg, protocol="pfl")
    if arg.protocol not in PROTOCOLS:
        raise ValueError(f"protocol {arg.protocol!r} is not one of {', '.join(PROTOCOLS)}")
    of = PROTOCOLS[arg.protocol]
    uneven = arg.protocol == "pfllib"
    return changed(
        data=dict(
            source=of.data,
            clients=of.clients,
            examples=of.examples,
            split="dirichlet_per_class" if uneven else "iid",
            concentration=0.1,
        ),
        family=dict(net=f"experiments.throughput.published:{of.net}"),
        method=dict(name="fedavg", args=dict(cohort=of.cohort)),
        train=dict(rounds=of.rounds, epochs=of.epochs, batch_size=of.batch, learning_rate=of.rate),
        run=dict(name=f"published_{arg.protocol}", eval_every=max(of.rounds // 10, 1), checkpoint_every=of.rounds),
    )


def random_data(of: Published, examples: int = 0) -> tuple[np.ndarray, ...]:
    """Images and labels of the protocol's shapes, for its time alone: (x_train, y_train, x_test, y_test)."""
    rng, n = np.random.default_rng(0), examples or of.examples
    x = rng.integers(0, 256, (n + 200, *of.shape)).astype(np.uint8)
    y = np.arange(n + 200) % of.classes
    return x[:n], y[:n], x[n:], y[n:]
