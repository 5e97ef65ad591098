"""FjORD on CIFAR-10 (figures 4 and 5, settings of the authors' code): ResNet18, uniform-5, 100 clients IID.

Commands:
  hetfl train --config=configs/fjord_cifar10.py --seeds=123..125                 with distillation
  hetfl train --config=configs/fjord_cifar10.py:distill=false
  hetfl train --config=configs/fjord_cifar10.py:distill=false,dropout=both       FjORD + eFD
  hetfl train --config=configs/fjord_cifar10.py:distill=false,dropout=random,target=0.6    eFD of one width
  hetfl train --config=configs/fjord_cifar10.py:tiers=10                         uniform-10
  hetfl train --config=configs/fjord_cifar10.py:drop_scale=0.5                   60% of the clients at width 1
  hetfl train --config=configs/fjord_cifar10.py:base=16,source=npz:cifar10.npz   base width 16 in place of 64
Device and time: for an accelerator; not run in full.
Published at p = 0.2, 0.4, 0.6, 0.8, 1 (read from a figure, +- 0.1): 81.4, 84.1, 85.05, 85.5, 85.55 with distillation;
83.0, 84.5, 84.87, 84.8, 84.7 without; 82.0, 83.5, 83.6, 83.2, 82.9 FjORD + eFD; from 0.4 on 82.6, 71, 59, 51 eFD. The
authors' code, 500 rounds, 3 seeds: 83.69, 86.06, 86.61, 86.51, 85.90 with; 83.90, 85.60, 86.19, 85.68, 84.77 without.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink
from hetfl_jax.run.mix import capped, uniform_tiers


def get_config(arg=""):
    arg = parse_arg(
        arg, tiers=5, drop_scale=1.0, base=64, distill=True, dropout="ordered", target=1.0, source="tfds:cifar10",
        quick=False,
    )  # fmt: skip
    config = changed(
        data=dict(
            source=arg.source,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2023, 0.1994, 0.2010),
            augment="crop_flip",
        ),
        family=dict(
            net="resnet18",
            hidden=tuple(arg.base * 2**stage for stage in range(4)),
            mix=capped(uniform_tiers(2 if arg.quick else arg.tiers, arg.drop_scale), arg.target),
            norm="bn_tiers",
        ),
        method=dict(name="fjord", args=dict(cohort=10, distill=arg.distill, dropout=arg.dropout)),
        capacity=dict(order="smallest_first"),
        train=dict(
            rounds=500,
            batch_size=32,
            weight_decay=1e-4,
        ),
        run=dict(
            name=f"fjord_cifar10_{arg.dropout}" + "_distilled" * arg.distill + f"_{arg.target:g}" * (arg.target < 1),
        ),
    )
    return shrink(config) if arg.quick else config
