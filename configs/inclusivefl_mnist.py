"""InclusiveFL on MNIST: MLPs of 2, 3 and 4 equal layers of 200, one model a depth, momentum distillation 0.2.

Commands:
  hetfl train --config=configs/inclusivefl_mnist.py
  hetfl train --config=configs/inclusivefl_mnist.py:timing=same
  hetfl train --config=configs/inclusivefl_mnist.py:beta=0.0         layer-wise sharing alone
No published figure: the paper trains RoBERTa on GLUE (its released code never applies the momentum).
"""

from hetfl_jax.run.config import changed, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, split="iid", beta=0.2, timing="previous", source="npz:mnist.npz", quick=False)
    config = changed(
        data=dict(
            source=arg.source,
            split=arg.split,
            concentration=0.6,
            mean=(0.1307,),
            std=(0.3081,),
        ),
        family=dict(
            net="mlp",
            hidden=(200, 200, 200, 200),
            mix="4x1-3x1-2x1",
            exits=False,
        ),
        method=dict(
            name="inclusivefl",
            args=dict(cohort=15, beta=arg.beta, timing=arg.timing),
        ),
        train=dict(
            rounds=300,
            epochs=5,
            batch_size=50,
            weight_decay=1e-3,
            clip_norm=10.0,
            round_decay=0.998,
        ),
        run=dict(
            name=f"inclusivefl_mnist_{arg.split}",
            eval_every=5,
            statistics_batch_size=50,
            checkpoint_every=5,
        ),
    )
    if not arg.quick:
        return config
    config.family.hidden, config.family.mix = config.family.hidden[:3], "3x1-2x1"
    return shrink(config)
