"""FedAvg on MNIST (McMahan et al. 2017, table 2): 100 clients, 10 a round, the FedAvg CNN or the 2NN.

Commands:
  hetfl train --config=configs/fedavg_mnist.py                              CNN, IID, E=5, B=10
  hetfl train --config=configs/fedavg_mnist.py:net=mlp
  hetfl train --config=configs/fedavg_mnist.py:split=noniid2
Published: the CNN reaches 99% test accuracy after 20 rounds (IID, E=5, B=10). FedProx: --config.method.name=fedprox
takes the further argument proximal_weight, see configs/fedprox_mnist.py.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, net="cnn", split="iid", source="npz:mnist.npz", quick=False)
    if arg.split not in ("iid", "noniid2"):
        raise ValueError(f"split {arg.split!r} is not one of iid, noniid2 (fedavg_mnist.py)")
    if arg.net not in ("cnn", "mlp"):
        raise ValueError(f"net {arg.net!r} is not one of cnn, mlp (fedavg_mnist.py)")
    iid = arg.split == "iid"
    config = changed(
        data=dict(
            source=arg.source,
            split="iid" if iid else "shards",
            mean=(0.1307,),
            std=(0.3081,),
        ),
        family=dict(
            net=arg.net,
            hidden=(32, 64, 512) if arg.net == "cnn" else (200,),
        ),
        method=dict(name="fedavg", args=dict(cohort=10)),
        train=dict(
            rounds=50,
            epochs=5,
            learning_rate=0.05,
        ),
        run=dict(
            name=f"fedavg_mnist_{arg.net}_{arg.split}",
            eval_every=5,
            statistics_batch_size=50,
            checkpoint_every=5,
        ),
    )
    return shrink(config) if arg.quick else config
