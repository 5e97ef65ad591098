"""FedProx on MNIST, the baseline setting of the FedDyn and FedDC code: MLP 784-200-200-10, 15 of 100 clients a round.

Commands:
  hetfl train --config=configs/fedprox_mnist.py                             IID, mu = 1e-4
  hetfl train --config=configs/fedprox_mnist.py:split=dirichlet_per_client
lr 0.1 decayed by 0.998 a round, weight decay 1e-3, batch 50, 5 epochs, 300 rounds, clipping at 10. Participation there
is independent per client with probability 0.15; here it is a fixed cohort of 15.
"""

from hetfl_jax.run.config import blocks, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, split="iid", source="npz:mnist.npz", quick=False)
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
            hidden=(200, 200),
            mix="a1",
            norm="none",
            scaler=False,
            lowering="auto",
        ),
        method=dict(
            name="fedprox",
            args=dict(cohort=15, proximal_weight=1e-4, server_optimizer=dict(name="sgd", learning_rate=1.0)),
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
            name=f"fedprox_mnist_{arg.split}",
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
    return shrink(config) if arg.quick else config
