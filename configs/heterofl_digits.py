"""HeteroFL a1-b1-c1-d1-e1 on the digits that scikit-learn ships: the first thing to run, no network.

Command: hetfl train --config=configs/heterofl_digits.py
Figures and time: README.md, "What you see".
"""

from hetfl_jax.run.config import blocks, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, mix="a1-b1-c1-d1-e1", quick=False)
    config = blocks(
        data=dict(
            source="digits",
            writers="",
            examples=0,
            validation=0.1,
            clients=100,
            split="iid",
            classes_per_client=2,
            concentration=0.5,
            test_fraction=0.2,
            mean=(0.306,),
            std=(0.377,),
            groups="none",
            own_test=0.0,
            augment="none",
            options=dict(),
        ),
        family=dict(
            net="conv",
            hidden=(32, 64, 128, 256),
            mix=arg.mix,
            norm="bn",
            scaler=True,
            lowering="auto",
        ),
        method=dict(name="heterofl", args=dict(cohort=10, assignment="dynamic", mask=True)),
        train=dict(
            rounds=40,
            epochs=5,
            steps=0,
            batch_size=10,
            optimizer="sgd",
            learning_rate=0.05,
            momentum=0.9,
            weight_decay=5e-4,
            clip_norm=1.0,
            milestones=(30,),
            decay_factor=0.1,
            round_decay=1.0,
            full_batch=False,
            keep_momentum=False,
            executor="bucketed",
            buckets="abcde" if arg.mix == "a1-b1-c1-d1-e1" else "each",  # compiling is what a short run costs
            clients_per_chunk=0,
            devices=0,
        ),
        run=dict(
            name="heterofl_digits",
            folder="runs",
            seed=0,
            eval_every=5,
            eval_masked=True,
            eval_batch_size=10,
            statistics_batch_size=100,
            checkpoint_every=5,
            keep=2,
        ),
    )
    return shrink(config) if arg.quick else config
