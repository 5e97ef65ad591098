"""DepthFL on CIFAR-10 at a small width (tables 3 and 4 of the paper in small): 100 clients IID, 10 a round, 40 rounds.

Commands (``source`` is an .npz with x_train, y_train, x_test, y_test, or tfds:cifar10):
  hetfl train --config=configs/depthfl_cifar10.py                              DepthFL with distillation, c = 1
  hetfl train --config=configs/depthfl_cifar10.py:ramp=12                      the ramp at 0.3 x rounds
  hetfl train --config=configs/depthfl_cifar10.py:distill=false
  hetfl train --config=configs/depthfl_cifar10.py:feddyn=false,distill=false   DepthFL (FedAvg)
  hetfl train --config=configs/depthfl_cifar10.py:exclusive=1                  all clients train depth 1; 4: a quarter,
                                                                               depth 4, on their own data only
  hetfl train --config=configs/depthfl_cifar10.py:method=heterofl              width levels at the same mean MACs
Device and time: one CPU core, about 10 minutes a run of 40 rounds with 5 local steps; see experiments/depthfl_cifar.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(
        arg, method="depthfl", width=8, distill=True, feddyn=True, ramp=0, exclusive=0, steps=5, rounds=40,
        source="npz:cifar10.npz", quick=False,
    )  # fmt: skip
    if arg.method not in ("depthfl", "heterofl"):
        raise ValueError(f"method {arg.method!r} is not one of depthfl, heterofl (depthfl_cifar10.py)")
    if not 0 <= arg.exclusive <= 4:
        raise ValueError(f"exclusive {arg.exclusive}, allowed 1..4, or 0 for none (depthfl_cifar10.py)")
    clients = 100 - 25 * max(0, arg.exclusive - 1)
    depth = arg.method == "depthfl"
    kind = "exclusive" + str(arg.exclusive) if arg.exclusive else "feddyn" if arg.feddyn else "fedavg"
    name = f"{kind}_{f'kd{arg.ramp}' if arg.distill else 'nokd'}" if depth else arg.method
    # 1.5 x the base width of the exits' net brings the mean multiply-adds of widths 1, 1/2, 1/4, 1/8 to the same.
    first = arg.width if depth else arg.width * 3 // 2
    family = dict(
        net="resnet18_exits" if depth else "preresnet18",
        hidden=tuple(first * 2**level for level in range(4)),
        mix=(f"{arg.exclusive}x1" if arg.exclusive else "4x1-3x1-2x1-1x1") if depth else "a1-b1-c1-d1",
        norm="bn_tracked" if depth else "bn",
        scaler=not depth,
    )
    args = dict(
        feddyn=arg.feddyn,
        feddyn_alpha=0.1,
        distill=arg.distill,
        ramp_rounds=arg.ramp,
        train_all=True,
        average_untrained=False,
    )
    config = changed(
        data=dict(
            source=arg.source,
            first_clients=clients,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            augment="crop_flip",
        ),
        family=family,
        method=dict(
            name=arg.method,
            args=dict(cohort=clients // 10, **(args if depth else dict(assignment="fixed", mask=False))),
        ),
        train=dict(
            rounds=arg.rounds,
            epochs=5,
            steps=arg.steps,
            batch_size=50,
            weight_decay=1e-3,
            round_decay=0.998,
            devices=1,
        ),
        run=dict(
            name=f"depthfl_cifar10_{name}",
            eval_every=40,
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
