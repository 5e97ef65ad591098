"""Split-Mix on digits (Hong et al., ICLR 2022, table 1): 5 domains x 10 clients, all in every round, budgets 8-4-2-1.

Commands:
  hetfl train --config=splitmix_digits                       Split-Mix, rate 0.01
  hetfl train --config=splitmix_digits:method=sheterofl      the baseline in which widths share one net, rate 0.1
  hetfl train --config=splitmix_digits:method=fedavg,width=0.125      one FedAvg run a width, on all clients, rate 0.1
  hetfl train --config=splitmix_digits:budget_order=shuffled          budgets that do not go with domains
  hetfl train --config=splitmix_digits:robust                adversarial training, norms of two branches, the knob
The five domains are made of one data set (MNIST): plain, inverted, rotated, noisy, and at half the resolution.
``domains`` names others: ``blended:<npz>`` mixes in photographs as MNIST-M does, and data sets of their own (MNIST,
SVHN, USPS, SynthDigits and MNIST-M in the paper) are npz:a.npz+npz:b.npz. Published mean accuracy over clients at
x0.125, x0.25, x0.5, x1: Split-Mix 84.6, 87.5, 89.0, 89.8; SHeteroFL 86.8, 87.9, 86.9, 81.3; FedAvg 86.1, 87.3, 88.7,
89.6 (other domains than ours, 30% of their data). ``local_accuracy`` has it: batches of up to 128 images of one client,
whose statistics the norms use. Reduced runs and figures: experiments/splitmix.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink

DOMAINS = "plain+inverted+rotated+noisy+downscaled"
KNOBS = (0.0, 0.2, 0.5, 0.8, 1.0)


def get_config(arg=""):
    arg = parse_arg(
        arg, method="splitmix", width=1.0, budget_order="clients", source="", domains=DOMAINS, examples=0, rounds=300,
        robust=False, quick=False,
    )  # fmt: skip
    splitmix, mixes = arg.method == "splitmix", {"splitmix": "w0.125x1", "sheterofl": "a1-b1-c1-d1"}
    args = {"splitmix": dict(budgets="8-4-2-1", budget_order=arg.budget_order), "sheterofl": dict(multiplicity=True)}
    config = changed(
        data=dict(
            source=arg.source or ("digits" if arg.quick else "npz:mnist.npz"),
            domains=tuple(arg.domains.split("+")),
            clients=50,
            split="domains",
            examples=arg.examples,
        ),
        family=dict(
            net="digits_cnn",
            hidden=(64, 64, 128, 2048, 512),
            mix=mixes.get(arg.method, f"w{arg.width:g}x1"),
            norm="bn_dual" if arg.robust else "bn_batch",
            rescale="both" if splitmix and not arg.robust else "none",
            scaler=arg.method == "sheterofl",
        ),
        method=dict(name=arg.method, args=dict(cohort=50, **args.get(arg.method, {}))),
        adversary=dict(name="pgd", args=dict(weight=0.5, knobs=KNOBS)) if arg.robust else {},
        capacity=dict(order="shuffled" if arg.budget_order == "shuffled" else "smallest_first"),
        train=dict(
            rounds=arg.rounds,
            batch_size=32,
            learning_rate=0.01 if splitmix and not arg.robust else 0.1,
            momentum=0.9,
            weight_decay=5e-4,
            schedule="cosine",
        ),
        run=dict(
            name=f"{arg.method}_digits" + ("_robust" if arg.robust else ""),
            eval_batch_size=128,
            eval_every=max(1, arg.rounds // (10 if arg.robust else 30)),
        ),
    )
    if not arg.quick:
        return config
    config = shrink(config)
    config.method.args.cohort = config.data.clients
    return config
