"""DepthFL on CIFAR-100 (tables 2, 3 and 4 of the paper): multi-exit ResNet18, 100 clients, 10 a round, 1000 rounds.

Commands, one a table row (``source`` is tfds:cifar100, or an .npz with x_train, y_train, x_test, y_test):
  hetfl train --config=configs/depthfl_cifar100.py                             DepthFL, table 4 IID with distillation
  hetfl train --config=configs/depthfl_cifar100.py:distill=false               table 4 IID without
  hetfl train --config=configs/depthfl_cifar100.py:split=noniid                table 4 non-IID (and distill=false)
  hetfl train --config=configs/depthfl_cifar100.py:feddyn=false,distill=false  tables 2 and 3, DepthFL (FedAvg)
  hetfl train --config=configs/depthfl_cifar100.py:exclusive=1                 tables 2 and 3, (a); 2, 3, 4 are (b)-(d)
  hetfl train --config=configs/depthfl_cifar100.py:inclusive=true              table 3, "InclusiveFL": only the deepest
                                                                               exit is trained, all of it averaged
  hetfl train --config=configs/depthfl_cifar100.py:method=heterofl             HeteroFL, widths 1, 1/2, 1/4, 1/8 (tables
                                                                               2 and 3 have 1, 3/4, 1/2, 1/4)
Exclusive rows train FedDyn and distillation as given; the published ones of tables 2 and 3 are without
(``feddyn=false,distill=false``).
Device and time: for an accelerator; not run in full (a round is about 5 TMACs of local training).
Published ensemble accuracy of the global model: 76.06 IID with distillation, 74.48 without, 74.92 and 73.18 non-IID;
DepthFL (FedAvg) 72.67; HeteroFL 57.61; exclusive DepthFL 69.68, 73.21, 70.29, 60.32. No deviations are published.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(
        arg, method="depthfl", width=64, distill=True, feddyn=True, ramp=300, exclusive=0, inclusive=False,
        split="iid", source="tfds:cifar100", store="device", quick=False,
    )  # fmt: skip
    if arg.method not in ("depthfl", "heterofl"):
        raise ValueError(f"method {arg.method!r} is not one of depthfl, heterofl (depthfl_cifar100.py)")
    if not 0 <= arg.exclusive <= 4:
        raise ValueError(f"exclusive {arg.exclusive}, allowed 1..4, or 0 for none (depthfl_cifar100.py)")
    if arg.split not in ("iid", "noniid"):
        raise ValueError(f"split {arg.split!r} is not one of iid, noniid (depthfl_cifar100.py)")
    clients = 100 - 25 * max(0, arg.exclusive - 1)
    depth = arg.method == "depthfl"
    kind = "exclusive" + str(arg.exclusive) if arg.exclusive else "feddyn" if arg.feddyn else "fedavg"
    kind = "inclusive" if arg.inclusive else kind
    name = f"{kind}_{f'kd{arg.ramp}' if arg.distill and not arg.inclusive else 'nokd'}" if depth else arg.method
    family = dict(
        net="resnet18_exits" if depth else "preresnet18",
        hidden=tuple(arg.width * 2**level for level in range(4)),
        mix=(f"{arg.exclusive}x1" if arg.exclusive else "4x1-3x1-2x1-1x1") if depth else "a1-b1-c1-d1",
        norm="bn_tracked" if depth else "bn",
        scaler=not depth,
    )
    args = dict(
        feddyn=arg.feddyn and not arg.inclusive,
        feddyn_alpha=0.1,
        distill=arg.distill and not arg.inclusive,
        ramp_rounds=arg.ramp,
        train_all=not arg.inclusive,
        average_untrained=arg.inclusive,
    )
    config = changed(
        data=dict(
            source=arg.source,
            first_clients=clients,
            split="iid" if arg.split == "iid" else "dirichlet_per_class",
            mean=(0.5071, 0.4867, 0.4408),
            std=(0.2675, 0.2565, 0.2761),
            augment="crop_flip",
        ),
        family=family,
        method=dict(
            name=arg.method,
            args=dict(cohort=clients // 10, **(args if depth else dict(assignment="fixed", mask=False))),
        ),
        train=dict(
            rounds=1000,
            epochs=5,
            batch_size=50,
            weight_decay=1e-3,
            round_decay=0.998,
        ),
        run=dict(
            name=f"depthfl_cifar100_{arg.split}_{name}",
            statistics_batch_size=50,
            keep=1,
        ),
    )
    if not arg.quick:
        return config
    config.data.first_clients = min(10, clients)
    config = shrink(config, batch_size=10)
    config.family.hidden = (16, 32)
    config.family.mix = "2x1-1x1" if depth else "a1-b1"
    config.family.net, config.family.norm = "conv", "none"
    config.train.steps = 0
    return config
