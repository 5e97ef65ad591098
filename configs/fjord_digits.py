"""FjORD, uniform-5 with distillation, on the digits that scikit-learn ships: three convolutions, no network.

Command: hetfl train --config=configs/fjord_digits.py
"""

from hetfl_jax.run.config import changed, parse_arg, shrink
from hetfl_jax.run.mix import uniform_tiers


def get_config(arg=""):
    arg = parse_arg(arg, tiers=5, drop_scale=1.0, distill=True, quick=False)
    config = changed(
        data=dict(
            validation=0.1,
            mean=(0.306,),
            std=(0.377,),
        ),
        family=dict(
            hidden=(16, 32, 64),
            mix=uniform_tiers(min(arg.tiers, 3) if arg.quick else arg.tiers, arg.drop_scale),
            norm="bn_tiers",
        ),
        method=dict(name="fjord", args=dict(cohort=10, distill=arg.distill)),
        train=dict(
            rounds=40,
            epochs=5,
            weight_decay=1e-4,
        ),
        run=dict(
            name="fjord_digits",
            eval_every=5,
            eval_masked=True,
            eval_batch_size=10,
            checkpoint_every=5,
        ),
    )
    return shrink(config) if arg.quick else config
