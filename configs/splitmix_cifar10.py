"""Split-Mix on CIFAR-10 (Hong et al., ICLR 2022, table 1): 100 clients of three classes, all in every round.

Commands (``source`` is an .npz with x_train, y_train, x_test, y_test, or tfds:cifar10):
  hetfl train --config=splitmix_cifar10                      three classes a client, rate 0.01
  hetfl train --config=splitmix_cifar10:iid                  iid, rate 0.01
  hetfl train --config=splitmix_cifar10:method=sheterofl     the baseline in which widths share one net, rate 0.1
  hetfl train --config=splitmix_cifar10:iid,robust           adversarial training, norms of two branches, the knob
PreResNet18 with the Scaler behind every convolution, five epochs of batches of 128, rate / 10 at rounds 150 and 250
(Split-Mix 200 and 300). Published for three classes a client, mean over clients at x0.125, x0.25, x0.5, x1: Split-Mix
48.0, 51.1, 52.1, 52.7; SHeteroFL 49.1, 51.4, 51.5, 49.9; FedAvg 43.4, 45.7, 50.3, 53.3; there a client's test classes
are drawn apart from its training classes, here they are the same. Device and time: an accelerator; see ``--dry-run``.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink

KNOBS = (0.0, 0.2, 0.5, 0.8, 1.0)


def get_config(arg=""):
    arg = parse_arg(
        arg, method="splitmix", width=1.0, iid=False, robust=False, source="npz:cifar10.npz", quick=False
    )  # fmt: skip
    splitmix, mixes = arg.method == "splitmix", {"splitmix": "w0.125x1", "sheterofl": "a1-b1-c1-d1"}
    args = {"splitmix": dict(class_masks=not arg.iid), "sheterofl": dict(multiplicity=True)}
    fast = arg.robust or arg.method == "sheterofl" or (arg.method == "fedavg" and arg.iid)
    config = changed(
        data=dict(
            source=arg.source,
            clients=100,
            augment="crop_flip",
            validation=0.1,
            **(dict(split="iid") if arg.iid else dict(split="shards", classes_per_client=3)),
        ),
        family=dict(
            net="preresnet18_splitmix",
            hidden=(64, 128, 256, 512),
            mix=mixes.get(arg.method, f"w{arg.width:g}x1"),
            norm="bn_dual" if arg.robust else "bn_batch",
            rescale="both" if splitmix and not arg.robust else "none",
            scaler=arg.method == "sheterofl",
        ),
        method=dict(name=arg.method, args=dict(cohort=100, **args.get(arg.method, {}))),
        adversary=dict(name="pgd", args=dict(weight=0.5, knobs=KNOBS)) if arg.robust else {},
        capacity=dict(order="smallest_first"),
        train=dict(
            rounds=400,
            epochs=5,
            batch_size=128,
            learning_rate=0.1 if fast else 0.01,
            momentum=0.9,
            weight_decay=5e-4,
            milestones=(200, 300) if splitmix else (150, 250),
        ),
        run=dict(name=f"{arg.method}_cifar10" + ("_robust" if arg.robust else ""), eval_batch_size=128),
    )
    if not arg.quick:
        return config
    config = shrink(config)
    config.data.examples, config.train.steps = 100, 1
    return config
