"""Coded messages on MNIST in the setting of FedLab's table: 100 clients by Dirichlet 0.5, 10 a round, 200 rounds.

Five steps of gradient descent on all of a client's examples at rate 0.1, the 2NN (784-200-200-10, 199,210 parameters),
plain mean of the participants.

Commands:
  hetfl train --config=fedpaq_mnist                       float32: FedAvg
  hetfl train --config=fedpaq_mnist:bits=4                QSGD, levels 0..15 and a sign
  hetfl train --config=fedpaq_mnist:bits=8
  hetfl train --config=fedpaq_mnist:top=0.05              the largest 5 %, with error feedback
Published (test accuracy in %, MB): float32 93.14, 302.45; 4 bits 93.03, 45.59; 8 bits 93.27, 85.06; the largest 5 %,
without error feedback, 11.35. What was run here, and how bytes are counted there:
experiments/communication.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, bits=0, top=0.0, feedback=True, source="npz:mnist.npz", quick=False)
    if arg.bits and arg.top:
        raise ValueError(f"bits {arg.bits} and top {arg.top}: need one of them (fedpaq_mnist.py)")
    codec, name = dict(name="none"), "float32"
    if arg.bits:
        codec = dict(name="qsgd", args=dict(levels=2**arg.bits - 1, scaling="max", length="joint"))
        name = f"qsgd{arg.bits}"
    if arg.top:
        codec = dict(name="top_k", args=dict(fraction=arg.top), error_feedback=arg.feedback)
        name = f"top{arg.top:g}" + ("" if arg.feedback else "_alone")
    config = changed(
        data=dict(source=arg.source, split="dirichlet_per_class", concentration=0.5),
        family=dict(net="mlp", hidden=(200, 200)),
        method=dict(name="fedpaq", args=dict(cohort=10, levels=0, ratio=1000.0)),
        uplink=codec,
        train=dict(rounds=200, epochs=5, full_batch=True, batch_size=10_000, learning_rate=0.1),
        run=dict(name=f"fedpaq_mnist_{name}", eval_every=10, checkpoint_every=200),
    )
    return shrink(config) if arg.quick else config
