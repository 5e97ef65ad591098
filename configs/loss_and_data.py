"""Is the loss of a client with much data worth more when clients are chosen? Seven scores, three correlations.

Commands:
  hetfl train --config=loss_and_data
  hetfl sweep --config=loss_and_data --sweep=rho,scores --over run.seed=0..19
  hetfl sweep --config=loss_and_data:method=depthfl,task=mnist --sweep=rho,scores --over run.seed=0..19
  hetfl sweep --config=loss_and_data:task=cifar10 --sweep=rho,scores --over run.seed=0..19     for an accelerator
Of 100 clients, 30 are drawn uniformly in each round, and the 10 of largest score take part. A quarter of the clients
each has the capacity 1, 1/2, 1/4, 1/8 (widths, HeteroFL) or 4, 3, 2, 1 layers (depths, DepthFL). rho says who has which
capacity: +1, those with most data have the largest; 0, independent; -1, those with most data have the smallest. A seed
fixes data, capacities, candidates and batches, so the runs of a seed are pairs. experiments/loss_and_data has the
question, the analysis and the answer.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink

SCORES = {
    "random": dict(loss=0.0, data=0.0, relative=False),
    "n": dict(loss=0.0, data=1.0, relative=False),
    "loss": dict(loss=1.0, data=0.0, relative=False),
    "loss_root_n": dict(loss=1.0, data=0.5, relative=False),
    "loss_n": dict(loss=1.0, data=1.0, relative=False),
    "relloss": dict(loss=1.0, data=0.0, relative=True),
    "relloss_n": dict(loss=1.0, data=1.0, relative=True),
}
ORDERS = {"+1": "by_data", "0": "shuffled", "-1": "against_data"}
METHODS = {
    "heterofl": (dict(assignment="fixed", mask=False), dict(mix="a1-b1-c1-d1", scaler=True)),
    "depthfl": (dict(feddyn=False), dict(mix="4x1-3x1-2x1-1x1")),
}
OWN_ROWS = dict(tested_on="clients", split="lognormal_dirichlet", own_test=0.2)
TASKS = {
    "teacher": dict(source="teacher", tested_on="clients", split="natural", test_fraction=0.2),
    "mnist": dict(source="npz:mnist.npz", mean=(0.1307,), std=(0.3081,), concentration=0.3, **OWN_ROWS),
    "cifar10": dict(
        source="npz:cifar10.npz",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.247, 0.2435, 0.2616),
        concentration=0.3,
        augment="crop_flip",
        **OWN_ROWS,
    ),
}


def sweep_rho():
    """Who has which capacity."""
    for order in ORDERS.values():
        yield {"capacity.order": order}


def sweep_scores():
    """By what clients are chosen."""
    for score in SCORES.values():
        yield {f"select.args.{name}": value for name, value in score.items()}


def get_config(arg=""):
    arg = parse_arg(arg, task="teacher", method="heterofl", score="loss", rho="0", rounds=150, quick=False)
    for name, known in dict(task=TASKS, method=METHODS, score=SCORES, rho=ORDERS).items():
        if arg[name] not in known:
            raise ValueError(f"{name} {arg[name]!r} is not one of {', '.join(known)} (loss_and_data:{name})")
    args, family = METHODS[arg.method]
    images = arg.task == "cifar10"
    hidden = ((64, 64) if arg.method == "heterofl" else (64,) * 4) if not images else ()
    config = changed(
        data=TASKS[arg.task],
        family=dict(net="conv" if images else "mlp", hidden=hidden, **family),
        method=dict(name=arg.method, args=dict(cohort=10, **args)),
        select=dict(name="loss_and_data", args=dict(candidates=30, level=None, weighted=False, **SCORES[arg.score])),
        capacity=dict(name="fixed", order=ORDERS[arg.rho]),
        train=dict(
            rounds=arg.rounds if not images else 10 * arg.rounds,
            steps=10,
            batch_size=32,
            learning_rate=0.1,
            clip_norm=5.0,
            buckets="each",  # a sweep compiles once for many runs
        ),
        run=dict(name=f"loss_and_data_{arg.method}_{arg.task}", eval_every=10, checkpoint_every=arg.rounds),
    )
    if not arg.quick:
        return config
    config = shrink(config)
    config.data.examples = 0
    config.select.args.candidates = 8
    return config
