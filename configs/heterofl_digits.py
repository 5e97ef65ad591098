"""HeteroFL a1-b1-c1-d1-e1 on the digits that scikit-learn ships: the first thing to run, no network.

Command: hetfl train --config=configs/heterofl_digits.py
Figures and time: README.md and experiments/heterofl_digits.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, mix="a1-b1-c1-d1-e1", quick=False)
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
        method=dict(name="heterofl", args=dict(cohort=10, assignment="dynamic", mask=True)),
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
            name="heterofl_digits",
            eval_every=5,
            eval_masked=True,
            eval_batch_size=10,
            checkpoint_every=5,
        ),
    )
    return shrink(config) if arg.quick else config


def sweep_mixes():
    """From all clients strong to more than half of them weakest."""
    for mix in ("a1", "a1-e1", "a1-b1-c1-d1-e1", "a6-b10-c11-d18-e55"):
        yield {"family.mix": mix}
