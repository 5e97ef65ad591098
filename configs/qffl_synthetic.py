"""q-FFL on Synthetic(alpha, beta) (Li et al., ICLR 2020, table 1): 100 devices, 10 a round, one linear layer.

Commands:
  hetfl train --config=qffl_synthetic --seeds 1..5         q = 1, five splits of one data set
  hetfl train --config=qffl_synthetic:q=0                  the plain mean of the participants' models
  hetfl train --config=qffl_synthetic:rounds=2000
Every device's examples are split 8:1:1 for training, validation and test; scores are on the devices' own test data.
Published, from memory of the paper, over five splits, after 20,000 rounds (test accuracy in %, variance in %^2):
q = 0: 80.8, worst tenth 18.8, variance 724; q = 1: 79.0, 31.1, 472. ``client_accuracy`` in the metrics has these.
5 ms a round on one CPU core; experiments/fairness has what came out.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, q=1.0, alpha=1.0, beta=1.0, sigma=1.0, data_seed=0, rounds=20_000, quick=False)
    config = changed(
        data=dict(
            source="synthetic",
            options=dict(alpha=arg.alpha, beta=arg.beta, sigma=arg.sigma, seed=arg.data_seed, test=0.0),
            split="natural",
            test_fraction=0.1,
            own_validation=0.1,
            tested_on="clients",
        ),
        family=dict(net="linear"),
        method=dict(name="qffl", args=dict(cohort=10, q=arg.q)),
        train=dict(rounds=arg.rounds, learning_rate=0.1),
        run=dict(name=f"qffl_synthetic_q{arg.q:g}", eval_every=max(1, arg.rounds // 10), checkpoint_every=arg.rounds),
    )
    if not arg.quick:
        return config
    config.data.options.sigma = 0.1
    config = shrink(config)
    config.data.examples = 0
    return config
