"""HeteroFL on digits where devices say who trains which width: budgets, a clock, rounds or FedBuff; no network.

100 clients have log-normal speeds and bandwidths. Each gets the largest width that it trains in ``max_seconds``.

Commands:
  hetfl train --config=configs/heterofl_devices.py                          rounds that wait for everybody
  hetfl train --config=configs/heterofl_devices.py:how=deadline             replies after 1.5 s do not count
  hetfl train --config=configs/heterofl_devices.py:how=first                the first 10 of 15 count
  hetfl train --config=configs/heterofl_devices.py:how=buffered             FedBuff: 40 at work, a step every 10 replies
How long each takes to a target: experiments/devices. Speeds are no measurement of real phones: docs/howto/clock.md.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink

WAYS = {
    "rounds": {},
    "deadline": {"deadline": 1.5},
    "first": {"first": 10},
    "buffered": {"concurrency": 40},
}


def get_config(arg=""):
    arg = parse_arg(arg, how="rounds", mix="a1-b1-c1", quick=False)
    if arg.how not in WAYS:
        raise ValueError(f"how {arg.how!r} is not one of {', '.join(WAYS)} (heterofl_devices.py)")
    config = changed(
        data=dict(
            validation=0.1,
            mean=(0.306,),
            std=(0.377,),
        ),
        family=dict(
            hidden=(32, 64, 128, 256),
            mix=arg.mix,
            norm="bn",
            scaler=True,
        ),
        method=dict(name="heterofl", args=dict(cohort=15 if arg.how == "first" else 10, mask=True)),
        capacity=dict(name="budget", max_seconds=2.0),
        devices=dict(
            name="lognormal",
            args=dict(macs_per_s=2e8, speed_spread=1.0, bandwidth_spread=0.5, speed_with_bandwidth=0.3),
            shift=0.5,
            spread=0.5,
            **WAYS[arg.how],
        ),
        train=dict(
            rounds=40,
            epochs=5,
            learning_rate=0.05,
            momentum=0.9,
            weight_decay=5e-4,
            clip_norm=1.0,
            milestones=(30,),
        ),
        run=dict(
            name=f"heterofl_devices_{arg.how}",
            eval_every=5,
            eval_masked=True,
            eval_batch_size=10,
            checkpoint_every=5,
        ),
    )
    if arg.quick:
        config = shrink(config)
        config.devices.first = min(config.devices.first, 3)
        config.devices.concurrency = min(config.devices.concurrency, 8)
    return config
