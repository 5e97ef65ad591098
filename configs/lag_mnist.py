"""LAG on MNIST: softmax regression by 10 workers with two digits each, full-batch gradients.

Commands:
  hetfl train --config=lag_mnist                          LAG-WK
  hetfl train --config=lag_mnist:rule=ps
  hetfl train --config=lag_mnist:rule=gd                  gradient descent: every worker uploads in every round
The rate is near 1 / L of the sum over all 60,000 examples, with pixels in 0..1. ``uploads.png`` shows who
uploaded when. The paper's own problems: experiments/communication.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, rule="wk", rounds=200, source="npz:mnist.npz", quick=False)
    config = changed(
        data=dict(source=arg.source, clients=10, split="shards", classes_per_client=2),
        family=dict(net="logistic"),
        method=dict(name="lag", args=dict(rule=arg.rule, l2=1e-4)),
        train=dict(rounds=arg.rounds, full_batch=True, batch_size=60_000, learning_rate=6e-7),
        run=dict(name=f"lag_mnist_{arg.rule}", eval_every=10, checkpoint_every=arg.rounds),
    )
    return shrink(config, epochs=1) if arg.quick else config
