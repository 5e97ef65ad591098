"""Every key of a config: its default, what it means, and what is allowed. Config files state what differs."""

from types import MappingProxyType
from typing import Any, NamedTuple

import ml_collections


class Key(NamedTuple):
    """One key of a config.

    >>> KEYS["train"]["batch_size"].default, KEYS["train"]["batch_size"].meaning
    (10, 'examples of a local step')
    """

    default: Any
    meaning: str  #: unit, what is allowed, when to change it
    of: type | None = None  #: what the values of a tuple are


KEYS = {
    "data": {
        "source": Key("digits", "digits, synthetic, teacher, npz:<path>, text:<path> or tfds:<name>; see `hetfl list`"),
        "options": Key(
            {},
            "further arguments of the source, e.g. alpha=0.5 of synthetic (its seed too: then data.seed "
            "is of the split alone), length=64 of text",
        ),
        "writers": Key("", "<npz path>:<array> with a client id for every training example, for split=natural"),
        "examples": Key(0, "training and test examples that are used, a random sample; 0 for all"),
        "validation": Key(0.0, "share of the training examples held out to choose the best round, 0 <= f < 1"),
        "clients": Key(100, "how many; split=natural takes one for each id instead"),
        "first_clients": Key(0, "use only so many of them, 0 for all"),
        "split": Key(
            "iid",
            "iid, shards, dirichlet_per_class, dirichlet_per_client, natural, per_group, domains, "
            "lognormal_counts, lognormal_shares, lognormal_dirichlet",
        ),
        "domains": Key((), "of clients: plain, inverted, blended:<npz>, rotated, noisy, downscaled, npz:<path>", str),
        "classes_per_client": Key(2, "of split=shards and the lognormal ones"),
        "concentration": Key(0.5, "of Dirichlet splits, > 0; small is uneven: at 0.1 most clients have 1 or 2 classes"),
        "least": Key(
            0,
            "examples that every client has: dirichlet_per_class draws until then; 0: 10, or half a fair share; "
            "lognormal_dirichlet adds them; 0: 20",
        ),
        "test_fraction": Key(0.2, "of split=natural: share of each client's rows that are its own test data"),
        "own_test": Key(0.0, "of other splits: the same"),
        "own_validation": Key(0.0, "share of each client's rows, test rows counted, that goes to one validation set"),
        "tested_on": Key("source", "the test set of the scores: of the source, or the clients' own rows (clients)"),
        "mean": Key((0.0,), "of pixels in 0..1: one number, or one a channel", float),
        "std": Key((1.0,), "likewise, > 0", float),
        "augment": Key("none", "while training: none, flip, crop_flip, window:<n>; of text corrupt:<p>"),
        "groups": Key("none", "clients see examples differently: none, rotation:<1, 2 or 4>, labels:<k>"),
        "seed": Key(-1, "of the split; -1: run.seed. Set it to keep the split when run.seed changes"),
    },
    "family": {
        "net": Key("conv", "see `hetfl list`; or <module>:<Class> of yours"),
        "hidden": Key((), "sizes of the hidden layers at width 1; () for the net's own", int),
        "mix": Key("a1", "levels and how often each occurs: a1-b1 (widths 1, 1/2), w1x2-w0.75x1, 4x1-2x1 (depths)"),
        "norm": Key("none", "none, in, ln, gn, or bn, with statistics: see `hetfl list`"),
        "scaler": Key(False, "divide by the width while training (HeteroFL)"),
        "rescale": Key("none", "a base net, of a mix such as w0.125x1, by its width: none, init, layer, both"),
        "lowering": Key("auto", "how convolutions run: auto, canonical, rows, lax"),
        "outputs": Key(0, "of the net, if more than the data has classes"),
        "embedding": Key(0, "of the transformer; 0 for its own 256"),
        "heads": Key(0, "of the transformer; 0 for its own 8"),
        "length": Key(0, "tokens of a window; 0 for the transformer's own 64"),
        "dropout": Key(-1.0, "of nets that have it, 0 <= p < 1; -1 for their own"),
        "exits": Key(True, "whether levels of depth have an exit each (mlp, conv, transformer)"),
    },
    "method": {
        "name": Key("fedavg", "see `hetfl list`; or a module of yours with a make"),
        "args": Key({"cohort": 10}, "of the method's make; cohort: clients a round"),
    },
    "objective": {
        "name": Key("cross_entropy", "local loss: cross_entropy in the form of the method; squared_error, of numbers"),
    },
    "select": {
        "name": Key("none", "who takes part, in place of the method's own rule; see `hetfl list`"),
        "args": Key({}, "of the selection"),
    },
    "uplink": {
        "name": Key("none", "codec of what clients send; see `hetfl list`"),
        "args": Key({}, "of the codec"),
        "error_feedback": Key(False, "keep what the codec left out, and send it later"),
        "ef21": Key(False, "error feedback by EF21: both ends keep an estimate of the change, and its error is coded"),
        "statistics": Key(False, "code the changes of batch statistics too; else they travel as float32"),
        "extra": Key(False, "code what a method sends besides the model too, as SCAFFOLD does"),
    },
    "downlink": {
        "name": Key("none", "codec of what the server sends: the change of the model since it was last sent"),
        "args": Key({}, "of the codec"),
        "error_feedback": Key(False, "keep what the codec left out, and send it later"),
        "ef21": Key(False, "error feedback by EF21"),
    },
    "adversary": {
        "name": Key("none", "who perturbs images, in training and for the score `robust`: none, pgd"),
        "args": Key({}, "of the adversary, e.g. weight=0.5 of noisy examples in training, knobs=(0.0,0.5,1.0)"),
    },
    "capacity": {
        "name": Key("none", "level of a client: none (the method's own rule), fixed, drawn every round, or budget"),
        "order": Key(
            "usual",
            "of fixed levels: by id usual (widths: largest first), smallest_first, shuffled; by_data (who has "
            "most examples has the largest), against_data",
        ),
        "max_seconds": Key(0.0, "of budget: a client's expected seconds a round; 0 for no limit"),
        "max_mb": Key(0.0, "of budget: 10^6 bytes that a client receives and sends in a round; 0 for no limit"),
        "max_memory_mb": Key(0.0, "of budget: memory of training, besides what the device has; 0 for no limit"),
    },
    "devices": {
        "name": Key("none", "what clients compute with, for a clock: none, classes, lognormal, csv:<path>"),
        "args": Key({}, "of classes or lognormal, e.g. mix=phone_2019:3,laptop:1, speed_with_data=0.5"),
        "online": Key("always", "when clients can be chosen: always, daily:<hours>, csv:<path>"),
        "deadline": Key(0.0, "seconds after which a round takes no reply; 0 for none"),
        "first": Key(0, "replies that a round waits for, the others of the cohort come too late; 0 for all"),
        "shift": Key(1.0, "factor of the time of computation, what is certain of it"),
        "spread": Key(0.0, "mean of an exponential draw that is added to shift, anew each round; FedPAQ: 0.5 and 0.5"),
        "concurrency": Key(0, "clients at work, if > 0: no rounds, a step whenever cohort replies are in (FedBuff)"),
        "staleness_exponent": Key(0.5, "of concurrency: a reply s steps late counts (1 + s)^-exponent"),
        "max_staleness": Key(20, "of concurrency: older replies are left out; so many models are kept"),
        "refill": Key("at_once", "of concurrency: when who is done is replaced: at_once, or after_step"),
    },
    "train": {
        "rounds": Key(100, "of the run, >= 1"),
        "epochs": Key(1, "passes over a client's examples in a round"),
        "steps": Key(0, "if > 0: so many local steps instead"),
        "batch_size": Key(10, "examples of a local step"),
        "optimizer": Key("sgd", "of clients, by its name in optax: sgd, adam, adamw, adagrad, ..."),
        "optimizer_args": Key({}, "further arguments of it, e.g. b1=0.8"),
        "learning_rate": Key(0.1, "of clients, > 0"),
        "momentum": Key(0.0, "of sgd"),
        "weight_decay": Key(0.0, "added to the gradient; decoupled from it in adamw"),
        "decay_layers": Key((), "names of layers whose kernels alone decay; () for all parameters", str),
        "clip_norm": Key(0.0, "largest norm of a gradient, 0 for no limit"),
        "schedule": Key("steps", "of the rate over rounds: steps (milestones, round_decay), constant, cosine"),
        "milestones": Key((), "rounds, from 0, from which on the rate is multiplied by decay_factor", int),
        "decay_factor": Key(0.1, "at every milestone"),
        "round_decay": Key(1.0, "factor of the rate from one round to the next"),
        "warmup_rounds": Key(0, "rounds over which the rate grows to its value"),
        "full_batch": Key(False, "a client's examples are one batch; batch_size is then the most one may hold"),
        "keep_momentum": Key(False, "a client's momentum lives on between its rounds, in its memory"),
        "precision": Key(
            "auto",
            "of the net's products and activations: auto (the device's own), float32, tf32, bfloat16; parameters and "
            "sums stay float32",
        ),
        "executor": Key("bucketed", "bucketed (levels at their shapes), chunked, vmapped (masked), debugging (no jit)"),
        "buckets": Key("auto", "levels that share a program: auto (what takes least time), each, one, or a-b-cde"),
        "clients_per_chunk": Key(0, "clients under one vmap; 0: 1 on a CPU, else as many as fit"),
        "devices": Key(0, "over which clients are spread, 0 for all"),
        "points_at_once": Key(0, "points of a sweep under one vmap on a device; 0: 1 on a CPU, else as many as fit"),
        "store": Key("device", "where client memory lives: device, host or file"),
    },
    "run": {
        "name": Key("run", "the run's folder below run.folder"),
        "folder": Key("runs", "of all runs"),
        "seed": Key(0, "of everything but the split (data.seed)"),
        "eval_every": Key(10, "rounds between evaluations"),
        "eval_masked": Key(False, "one evaluation program for all levels, at full shape: compiles once, runs slower"),
        "eval_batch_size": Key(100, "examples"),
        "statistics_batch_size": Key(100, "examples of a batch in the statistics pass of norm=bn"),
        "checkpoint_every": Key(10, "rounds between checkpoints"),
        "keep": Key(2, "checkpoints that are kept, besides the best"),
    },
}


def defaults() -> ml_collections.ConfigDict:
    """A config of all keys at their defaults, not locked.

    >>> defaults().train.rounds
    100
    """
    copied = {b: {n: _copy(key.default) for n, key in keys.items()} for b, keys in KEYS.items()}
    return ml_collections.ConfigDict(copied)


def _copy(value: Any) -> Any:
    """A dict as one of its own, so that no config changes the defaults."""
    return dict(value) if isinstance(value, dict | MappingProxyType) else value
