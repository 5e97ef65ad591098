"""FedProx on MNIST, the baseline setting of the FedDyn and FedDC code: MLP 784-200-200-10, 15 of 100 clients a round.

Commands:
  hetfl train --config=configs/fedprox_mnist.py                             IID, mu = 1e-4
  hetfl train --config=configs/fedprox_mnist.py:split=dirichlet_per_client
lr 0.1 decayed by 0.998 a round, weight decay 1e-3, batch 50, 5 epochs, 300 rounds, clipping at 10. Participation there
is independent per client with probability 0.15; here it is a fixed cohort of 15.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, split="iid", source="npz:mnist.npz", quick=False)
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
            hidden=(200, 200),
        ),
        method=dict(
            name="fedprox",
            args=dict(cohort=15, proximal_weight=1e-4),
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
            name=f"fedprox_mnist_{arg.split}",
            eval_every=5,
            statistics_batch_size=50,
            checkpoint_every=5,
        ),
    )
    return shrink(config) if arg.quick else config
