"""Nets by name."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from hetfl_jax.models.conv import conv, depthwise_conv
from hetfl_jax.models.digits import AlexNet, DigitsCNN
from hetfl_jax.models.exits import ExitResNet
from hetfl_jax.models.lstm import LSTM
from hetfl_jax.models.nets import CNN, MLP, Conv, LeNet, Logistic, PreResNet, TutorialCNN
from hetfl_jax.models.resnet import ResNet
from hetfl_jax.models.transformer import Transformer

__all__ = [
    "CNN", "LSTM", "MLP", "NETS", "Conv", "ExitResNet", "LeNet", "Logistic", "PreResNet", "ResNet", "Transformer",
    "TutorialCNN", "build", "conv", "depthwise_conv",
]  # fmt: skip


def _preresnet_1112(**fields: Any) -> nn.Module:
    return PreResNet(blocks=(1, 1, 1, 2), **fields)


def _preresnet18(**fields: Any) -> nn.Module:
    return PreResNet(blocks=(2, 2, 2, 2), **fields)


def _preresnet18_splitmix(**fields: Any) -> nn.Module:
    return PreResNet(blocks=(2, 2, 2, 2), scales_convolutions=True, **fields)


def _linear(**fields: Any) -> nn.Module:
    return MLP(**{**fields, "hidden": ()})


NETS: dict[str, Callable[..., nn.Module]] = {
    "linear": _linear,
    "logistic": Logistic,
    "mlp": MLP,
    "cnn": CNN,
    "lenet": LeNet,
    "tutorial_cnn": TutorialCNN,
    "conv": Conv,
    "resnet18": ResNet,
    "resnet18_exits": ExitResNet,
    "transformer": Transformer,
    "lstm": LSTM,
    "preresnet_1112": _preresnet_1112,
    "preresnet18": _preresnet18,
    "preresnet18_splitmix": _preresnet18_splitmix,
    "digits_cnn": DigitsCNN,
    "alexnet": AlexNet,
}


def build(net: str, **fields: Any) -> nn.Module:
    """The net called ``net`` with the given fields.

    Args:
      net: one of ``NETS``, see ``hetfl list``.
      fields: of the module, e.g. ``hidden``, ``classes``, ``norm``.

    Raises:
      ValueError: an unknown name, or a field that the net has not.

    >>> build("mlp", hidden=(8,), classes=3).hidden
    (8,)
    >>> build("mlp", kernel=3)
    Traceback (most recent call last):
    ValueError: net 'mlp' has no field 'kernel', set in this config (family.kernel)
    """
    if net not in NETS:
        raise ValueError(f"net {net!r} is not one of {', '.join(NETS)} (family.net)")
    made = NETS[net]()
    if wrong := [name for name in fields if not hasattr(made, name)]:
        raise ValueError(f"net {net!r} has no field {wrong[0]!r}, set in this config (family.{wrong[0]})")
    return NETS[net](**fields)
