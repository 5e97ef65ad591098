"""FedDyn and SCAFFOLD on MNIST in the setting of the FedDC code: MLP 784-200-200-10, participation 0.15 of 100.

Commands:
  hetfl train --config=configs/feddyn_mnist.py                              IID, alpha = 0.01
  hetfl train --config=configs/feddyn_mnist.py:method=scaffold
  hetfl train --config=configs/feddyn_mnist.py:split=dirichlet_per_client,store=file
lr 0.1 decayed by 0.998 a round, weight decay 1e-3, batch 50, 5 epochs, 300 rounds, clipping at 10; every client takes
part independently with probability 0.15. ``mean_examples=True`` gives a client alpha x (mean size) / (its size), as the
official code does; the run puts the number in. Evaluated are the model that is sent and the participants' mean (sel).
No published figure for MNIST was seen. The paper's advice on alpha: 0.1, 0.01 or 0.001 by data set.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, method="feddyn", split="iid", source="npz:mnist.npz", store="device", quick=False)
    methods = dict(
        feddyn=dict(feddyn_alpha=0.01, feddyn_denominator="all", max_correction=0.0, keep_models=False),
        scaffold=dict(server_learning_rate=1.0, keep_models=False),
    )
    if arg.method not in methods:
        raise ValueError(f"method {arg.method!r} is not one of {', '.join(methods)} (feddyn_mnist.py)")
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
            name=arg.method,
            args=dict(cohort=15, participation=0.15, mean_examples=True, **methods[arg.method]),
        ),
        train=dict(
            rounds=300,
            epochs=5,
            batch_size=50,
            weight_decay=1e-3,
            clip_norm=10.0,
            round_decay=0.998,
            store=arg.store,
        ),
        run=dict(
            name=f"{arg.method}_mnist_{arg.split}",
            eval_every=5,
            statistics_batch_size=50,
            checkpoint_every=5,
        ),
    )
    return shrink(config) if arg.quick else config
