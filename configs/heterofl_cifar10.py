"""HeteroFL on CIFAR-10 (table 1 of the paper's poster): PreResNet with blocks 1-1-1-2, 9.6 M parameters.

Commands:
  hetfl train --config=configs/heterofl_cifar10.py                          IID, a1-e1, dynamic
  hetfl train --config=configs/heterofl_cifar10.py:mix=a1-b1-c1-d1-e1,split=noniid2
  hetfl train --config=configs/heterofl_cifar10.py:source=npz:cifar10.npz
Device and time: for an accelerator; not run in full (one round is about 20 minutes on two CPU cores).
Published, last column of the table: a-e IID 90.29%, non-iid-2 92.10% local, 59.11% global; a-b-c-d-e 88.83, 92.49,
61.64. Single runs of non-iid cells differ by up to 3.5 points.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, mix="a1-e1", split="iid", source="tfds:cifar10", quick=False)
    if arg.split not in ("iid", "noniid2"):
        raise ValueError(f"split {arg.split!r} is not one of iid, noniid2 (heterofl_cifar10.py)")
    iid = arg.split == "iid"
    config = changed(
        data=dict(
            source=arg.source,
            split="iid" if iid else "shards",
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2023, 0.1994, 0.2010),
            augment="crop_flip",
        ),
        family=dict(
            net="preresnet_1112",
            hidden=(64, 128, 256, 512),
            mix=arg.mix,
            norm="bn",
            scaler=True,
        ),
        method=dict(name="heterofl", args=dict(cohort=10, assignment="dynamic", mask=True)),
        train=dict(
            rounds=400 if iid else 800,
            epochs=5,
            momentum=0.9,
            weight_decay=5e-4,
            clip_norm=1.0,
            milestones=(150, 250) if iid else (300, 500),
        ),
        run=dict(
            name=f"heterofl_cifar10_{arg.split}_{arg.mix}",
            eval_every=5,
            statistics_batch_size=50,
            checkpoint_every=5,
        ),
    )
    return shrink(config) if arg.quick else config
