"""IFCA on Rotated CIFAR-10 (Ghosh et al. 2020, table 1): two rotations, 200 clients of 500 images, 20 a round.

Commands (``source`` is an .npz with x_train, y_train, x_test, y_test, or tfds:cifar10):
  hetfl train --config=configs/ifca_rotated_cifar10.py                 k = 2, starts drawn until both models are wanted
  hetfl train --config=configs/ifca_rotated_cifar10.py:clusters=1      the global model
Five epochs of batches of 50, rate 0.25 x 0.99^round, L2 penalty 0.004 on the weights of two layers, windows of 24 x 24;
clients choose on central windows and by the loss alone, where the published code draws new windows for every model and
adds its penalty. Published accuracy, from memory of the paper: 81.51, global 77.87. Device and time: an accelerator; a
round is 3,140 GMACs (``--dry-run``). Without the penalty: experiments/ifca_rotated_cifar.
"""

from hetfl_jax.run.config import blocks, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, clusters=2, source="npz:cifar10.npz", quick=False)
    config = blocks(
        data=dict(
            source=arg.source,
            writers="",
            examples=0,
            validation=0.0,
            clients=200,
            split="per_group",
            classes_per_client=2,
            concentration=0.5,
            test_fraction=0.2,
            mean=(0.0,),
            std=(1.0,),
            groups="rotation:2",
            own_test=0.0,
            augment="window:24",
            options=dict(),
        ),
        family=dict(
            net="tutorial_cnn", hidden=(64, 64, 384, 192), mix="a1", norm="none", scaler=False, lowering="auto"
        ),
        method=dict(
            name="ifca",
            args=dict(
                cohort=20,
                clusters=arg.clusters,
                averaging="models",
                weighted=False,
                over="",
                over_args=dict(),
                restarts=8 if arg.clusters > 1 else 1,
                restart_rounds=3,
                min_share=0.35 if arg.clusters > 1 else 0.0,
                forced_rounds=0,
                shared=(),
                freeze_shared=False,
                warm_start="",
                redraw=("head",),
                server_optimizer=dict(name="sgd", learning_rate=1.0),
            ),
        ),
        train=dict(
            rounds=600,
            epochs=5,
            steps=0,
            batch_size=50,
            optimizer="sgd",
            learning_rate=0.25,
            momentum=0.0,
            weight_decay=0.004,
            decay_layers=("dense_2", "dense_3"),
            clip_norm=0.0,
            milestones=(),
            decay_factor=0.1,
            round_decay=0.99,
            full_batch=False,
            keep_momentum=False,
            executor="bucketed",
            buckets="each",
            clients_per_chunk=0,
            devices=0,
        ),
        run=dict(
            name=f"ifca_rotated_cifar10_k{arg.clusters}",
            folder="runs",
            seed=0,
            eval_every=10,
            eval_masked=False,
            eval_batch_size=500,
            statistics_batch_size=50,
            checkpoint_every=10,
            keep=2,
        ),
    )
    if not arg.quick:
        return config
    config = shrink(config)
    config.method.args.update(dict(restarts=1, min_share=0.0))
    config.data.clients, config.data.examples, config.train.steps = 10, 100, 1
    return config
