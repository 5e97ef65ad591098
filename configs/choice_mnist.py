"""Who takes part, on MNIST: Power-of-Choice with Dirichlet labels, DivFL with writers or a power law.

Commands:
  hetfl train --config=choice_mnist                                  pow-d with d = 9 of 100 clients, 3 a round
  hetfl train --config=choice_mnist:select=random_with_replacement
  hetfl train --config=choice_mnist:alpha=2
  hetfl train --config=choice_mnist:split=natural,select=divfl,m=10   539 writers
  hetfl train --config=choice_mnist:split=lognormal_counts,select=divfl,m=10   200 clients of 3 digits each
The settings of Power-of-Choice on FashionMNIST: MLP 784-64-30-10, 30 steps of batches of 64, rate 0.005, halved at
rounds 150 and 300. Published there: up to 10 points over random selection at alpha 0.3; others found no difference.
60 ms a round on one CPU core; experiments/selection has what came out.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(
        arg, select="power_of_choice", d=9, m=3, alpha=0.3, split="dirichlet_per_class", rounds=300, rate=0.005,
        quick=False,
    )  # fmt: skip
    own = dict(test_fraction=0.1) if arg.split == "natural" else dict(test_fraction=0.0, own_test=0.1)
    args = dict(power_of_choice=dict(candidates=arg.d), divfl=dict(by="examples"))
    clients = 200 if arg.split == "lognormal_counts" else 100
    config = changed(
        data=dict(
            source="npz:mnist.npz", writers="mnist_writers.npz:writer_train", mean=(0.1307,), std=(0.3081,),
            split=arg.split, clients=clients, classes_per_client=3, concentration=arg.alpha, **own,
        ),
        family=dict(net="mlp", hidden=(64, 30)),
        method=dict(name="qffl", args=dict(cohort=arg.m, q=0.0)),
        select=dict(name=arg.select, args=args.get(arg.select, {})),
        train=dict(
            rounds=arg.rounds, steps=30, batch_size=64, learning_rate=arg.rate, milestones=(150, 300), decay_factor=0.5,
            weight_decay=1e-4,
        ),
        run=dict(name=f"choice_mnist_{arg.select}", eval_every=10, checkpoint_every=arg.rounds),
    )  # fmt: skip
    if not arg.quick:
        return config
    config = shrink(config)
    config.data.first_clients = 10 if arg.split == "natural" else 0
    config.method.args.cohort = 3
    return config
