"""Who takes part, on Synthetic(1, 1), 30 devices, 3 a round: Power-of-Choice (Cho, Wang, Joshi, AISTATS 2022), DivFL.

Commands:
  hetfl train --config=choice_synthetic                              pow-d with d = 6
  hetfl train --config=choice_synthetic:select=random_with_replacement
  hetfl train --config=choice_synthetic:d=30
  hetfl train --config=choice_synthetic --config.select.args.kind=rpow
  hetfl train --config=choice_synthetic:select=divfl
A local "epoch" of the original is one step: 30 steps a round, batches of 50, rate 0.05, halved at rounds 300 and 600.
The mean over replies is plain, as amounts of data count in who is asked. 10 ms a round on one CPU core;
experiments/selection has what came out.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, select="power_of_choice", d=6, m=3, data_seed=0, rounds=800, quick=False)
    args = dict(power_of_choice=dict(candidates=arg.d), divfl=dict(by="examples"))
    config = changed(
        data=dict(
            source="synthetic",
            clients=30,
            options=dict(sigma=1.0, seed=arg.data_seed),
            split="natural",
            test_fraction=0.1,
        ),
        family=dict(net="linear"),
        method=dict(name="qffl", args=dict(cohort=arg.m, q=0.0)),
        select=dict(name=arg.select, args=args.get(arg.select, {})),
        train=dict(
            rounds=arg.rounds, steps=30, batch_size=50, learning_rate=0.05, milestones=(300, 600), decay_factor=0.5
        ),
        run=dict(name=f"choice_synthetic_{arg.select}", eval_every=10, checkpoint_every=arg.rounds),
    )
    if not arg.quick:
        return config
    config.data.options.sigma = 0.1
    config = shrink(config)
    config.data.examples = 0
    config.method.args.cohort = 3
    return config
