"""IFCA on Rotated MNIST (Ghosh et al. 2020, table 1): four rotations, m clients of n images, MLP 784-200-10.

Commands:
  hetfl train --config=configs/ifca_rotated_mnist.py                        m = 4800, n = 50
  hetfl train --config=configs/ifca_rotated_mnist.py:m=2400
  hetfl train --config=configs/ifca_rotated_mnist.py:m=1200,restarts=3      three starts for three rounds, then one
  hetfl train --config=configs/ifca_rotated_mnist.py:m=1200,clusters=1      the global model
  hetfl train --config=configs/ifca_rotated_mnist.py:m=240,examples=12000   a fifth of the images, for one core
Every client takes part in every round with 10 full-batch steps of rate 0.1; 300 rounds; test images of each rotation
in clients of n, each judged by the model that is best on it (its labels are used, as in the published tables).
Published accuracy, from memory of the paper: 94.20, 95.05, 95.25 for m = 4800, 2400, 1200; global 86.74, 88.65, 89.73.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, m=4800, clusters=4, restarts=1, examples=0, source="npz:mnist.npz", quick=False)
    held = 4 * (arg.examples or 60_000) // arg.m  # images of a client, all of them in each step
    config = changed(
        data=dict(
            source=arg.source,
            examples=arg.examples,
            clients=arg.m,
            split="per_group",
            groups="rotation:4",
        ),
        family=dict(net="mlp", hidden=(200,), mix="a1", norm="none", scaler=False, lowering="auto"),
        method=dict(
            name="ifca",
            args=dict(
                cohort=arg.m,
                clusters=arg.clusters,
                restarts=arg.restarts,
            ),
        ),
        train=dict(
            rounds=300,
            epochs=10,
            batch_size=held,
            full_batch=True,
        ),
        run=dict(
            name=f"ifca_rotated_mnist_m{arg.m}_k{arg.clusters}",
            eval_batch_size=held,
            statistics_batch_size=50,
        ),
    )
    if not arg.quick:
        return config
    config.data.clients, config.method.args.cohort = 8, 8
    config.train.batch_size = 2_000 // max(1, 8 // 4)
    return shrink(config, rounds=30)
