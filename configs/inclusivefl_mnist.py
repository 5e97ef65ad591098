"""InclusiveFL on MNIST: MLPs of 2, 3 and 4 equal layers of 200, one model a depth, momentum distillation 0.2.

Commands:
  hetfl train --config=configs/inclusivefl_mnist.py
  hetfl train --config=configs/inclusivefl_mnist.py:timing=same
  hetfl train --config=configs/inclusivefl_mnist.py:beta=0.0         layer-wise sharing alone
No published figure: the paper trains RoBERTa on GLUE (its released code never applies the momentum).
"""

from hetfl_jax.run.config import blocks, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, split="iid", beta=0.2, timing="previous", source="npz:mnist.npz", quick=False)
    config = blocks(
        data=dict(
            source=arg.source,
            writers="",
            examples=0,
            validation=0.0,
            clients=100,
            split=arg.split,
            classes_per_client=2,
            concentration=0.6,
            test_fraction=0.2,
            mean=(0.1307,),
            std=(0.3081,),
            groups="none",
            own_test=0.0,
            augment="none",
            options=dict(),
        ),
        family=dict(
            net="mlp",
            hidden=(200, 200, 200, 200),
            mix="4x1-3x1-2x1",
            exits=False,
            norm="none",
            scaler=False,
            lowering="auto",
        ),
        method=dict(
            name="inclusivefl",
            args=dict(cohort=15, beta=arg.beta, timing=arg.timing),
        ),
        train=dict(
            rounds=300,
            epochs=5,
            steps=0,
            batch_size=50,
            optimizer="sgd",
            learning_rate=0.1,
            momentum=0.0,
            weight_decay=1e-3,
            clip_norm=10.0,
            milestones=(),
            decay_factor=0.1,
            round_decay=0.998,
            full_batch=False,
            keep_momentum=False,
            executor="bucketed",
            buckets="each",
            clients_per_chunk=0,
            devices=0,
        ),
        run=dict(
            name=f"inclusivefl_mnist_{arg.split}",
            folder="runs",
            seed=0,
            eval_every=5,
            eval_masked=False,
            eval_batch_size=100,
            statistics_batch_size=50,
            checkpoint_every=5,
            keep=2,
        ),
    )
    if not arg.quick:
        return config
    config.family.hidden, config.family.mix = config.family.hidden[:3], "3x1-2x1"
    return shrink(config)
