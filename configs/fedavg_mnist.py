"""FedAvg on MNIST (McMahan et al. 2017, table 2): 100 clients, 10 a round, the FedAvg CNN or the 2NN.

Commands:
  hetfl train --config=configs/fedavg_mnist.py                              CNN, IID, E=5, B=10
  hetfl train --config=configs/fedavg_mnist.py:net=mlp
  hetfl train --config=configs/fedavg_mnist.py:split=noniid2
Published: the CNN reaches 99% test accuracy after 20 rounds (IID, E=5, B=10). FedProx: --config.method.name=fedprox
takes the further argument proximal_weight, see configs/fedprox_mnist.py.
"""

from hetfl_jax.run.config import blocks, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, net="cnn", split="iid", source="npz:mnist.npz", quick=False)
    if arg.split not in ("iid", "noniid2"):
        raise ValueError(f"split {arg.split!r} is not one of iid, noniid2 (fedavg_mnist.py)")
    if arg.net not in ("cnn", "mlp"):
        raise ValueError(f"net {arg.net!r} is not one of cnn, mlp (fedavg_mnist.py)")
    iid = arg.split == "iid"
    config = blocks(
        data=dict(
            source=arg.source,
            writers="",
            examples=0,
            validation=0.0,
            clients=100,
            split="iid" if iid else "shards",
            classes_per_client=2,
            concentration=0.5,
            test_fraction=0.2,
            mean=(0.1307,),
            std=(0.3081,),
            groups="none",
            own_test=0.0,
            augment="none",
            options=dict(),
        ),
        family=dict(
            net=arg.net,
            hidden=(32, 64, 512) if arg.net == "cnn" else (200,),
            mix="a1",
            norm="none",
            scaler=False,
            lowering="auto",
        ),
        method=dict(name="fedavg", args=dict(cohort=10, server_optimizer=dict(name="sgd", learning_rate=1.0))),
        train=dict(
            rounds=50,
            epochs=5,
            steps=0,
            batch_size=10,
            optimizer="sgd",
            learning_rate=0.05,
            momentum=0.0,
            weight_decay=0.0,
            clip_norm=0.0,
            milestones=(),
            decay_factor=0.1,
            round_decay=1.0,
            full_batch=False,
            keep_momentum=False,
            executor="bucketed",
            buckets="each",
            clients_per_chunk=0,
            devices=0,
        ),
        run=dict(
            name=f"fedavg_mnist_{arg.net}_{arg.split}",
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
