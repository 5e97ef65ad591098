"""Wrong inputs, on the command line and in Python: each ends in one line that names value, what is allowed and key."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hetfl_jax as hf
from hetfl_jax.core.types import Cohort
from hetfl_jax.data.partition import Partition
from hetfl_jax.engine.stores import Packing, packed_device_store
from hetfl_jax.methods import fedavg, feddyn, scaffold
from hetfl_jax.parts import select
from hetfl_jax.parts.compose import Slots
from hetfl_jax.run import lab
from hetfl_jax.run.cli import main
from tests.helpers import mlp_family, sgd, toy_population

SMALL = tuple(f"--config.{c}" for c in ("family.net=mlp", "family.hidden=(8,)", "family.norm=none", "train.devices=1"))

#: changes of the default config -> a part of the line
KEYS = {
    "train.learning_rate=nan": "learning_rate nan, allowed a number (train.learning_rate)",
    "train.learning_rate=inf": "learning_rate inf, allowed a finite number (train.learning_rate)",
    "train.learning_rate=-0.1": "learning_rate -0.1, allowed >= 1e-12 and finite (train.learning_rate)",
    "train.momentum=1.0": "momentum 1.0, allowed 0 <= m < 1 (train.momentum)",
    "train.momentum=-1.0": "momentum -1.0, allowed >= 0 and finite (train.momentum)",
    "train.weight_decay=-1.0": "weight_decay -1.0, allowed >= 0 and finite (train.weight_decay)",
    "train.clip_norm=inf": "clip_norm inf, allowed a finite number (train.clip_norm)",
    "train.decay_factor=0.0": "decay_factor 0.0, allowed >= 1e-12 and finite (train.decay_factor)",
    "train.round_decay=-1.0": "round_decay -1.0, allowed >= 1e-12 and finite (train.round_decay)",
    "train.epochs=0": "epochs 0 and steps 0: nobody trains, need one >= 1 (train.epochs)",
    "train.batch_size=0": "batch_size 0, allowed >= 1 and finite (train.batch_size)",
    "train.optimizer=sgdd": "local optimizer 'sgdd' is not one of sgd, adam",
    "train.optimizer_args.foo=1": "argument 'foo' is not one of learning_rate, momentum",
    "train.schedule=linear": "schedule 'linear' is not one of steps, constant, cosine (train.schedule)",
    "train.decay_layers=('nope',)": "layer 'nope' is not one of dense_0, head (train.decay_layers)",
    "train.devices=99": "99 devices, allowed 1..",
    "train.clients_per_chunk=-1": "clients_per_chunk -1, allowed >= 0",
    "train.points_at_once=-1": "points_at_once -1, allowed >= 0 (train.points_at_once)",
    "train.store=disk": "store 'disk' is not one of device, host, file (train.store)",
    "train.executor=fast": "executor 'fast' is not one of vmapped, chunked, bucketed, debugging",
    "run.seed=-1": "seed -1, allowed 0..4294967295 (run.seed)",
    "run.eval_every=0": "eval_every 0, allowed >= 1 (run.eval_every)",
    "run.keep=0": "keep 0, allowed >= 1 (run.keep)",
    "data.seed=-2": "seed -2, allowed -1..4294967295 (data.seed)",
    "data.clients=0": "0 clients, allowed 1..1294",
    "data.examples=-5": "examples -5: need a whole number >= 0 (data.examples)",
    "data.validation=nan": "validation nan, allowed a number (data.validation)",
    "data.own_test=1.0": "local test fraction 1.0, allowed 0 <= f < 1",
    "data.first_clients=1000": "first 1000 clients, allowed 1..100, or 0 for all",
    "data.mean=(0.1,0.2)": "mean (0.1, 0.2) for images of 1 channels: need 1 entry (data.mean)",
    "data.std=(0.0,)": "std (0.0,): need finite numbers > 0 (data.std)",
    "data.augment=spin": "augmentation 'spin' is not one of none, flip",
    "data.groups=rotation:3": "groups 'rotation:3': allowed none, rotation:1, 2 or 4",
    "data.source=nowhere": "data source 'nowhere' is not one of digits, synthetic",
    "data.source=npz:missing.npz": "no file missing.npz here or in",
    "data.options.foo=1": "option 'foo' is not one of none of digits (data.options)",
    "family.net=cnnn": "net 'cnnn' is not one of",
    "family.norm=batch": "norm 'batch' is not one of",
    "family.outputs=3": "outputs 3 for labels 0..9: need 0 or >= 10 (family.outputs)",
    "family.mix=w2x1": "width 2 in mix 'w2x1', allowed 0 < width <= 1 (family.mix)",
    "method.args.cohort=0": "cohort of 0 clients, allowed 1..100 (method.args.cohort)",
    "method.args.foo=1": "unknown config key 'method.args.foo': 'foo' is not one of assignment, cohort",
    "method.name=fedsgd": "method 'fedsgd' is not one of",
    "select.name=best": "selection 'best' is not one of none, uniform",
    "select.args.foo=1": "argument 'foo' of a select that is none: need select.name (select.args)",
    "uplink.name=zip": "codec zip, allowed none, qsgd",
    "uplink.error_feedback=True": "error_feedback of a uplink that is none: need uplink.name (uplink.error_feedback)",
    "downlink.args.bits=4": "argument 'bits' of a downlink that is none: need downlink.name (downlink.args)",
    "capacity.name=random": "capacity 'random' is not one of none, fixed, drawn, budget (capacity.name)",
    "capacity.name=budget": "capacity 'budget' of devices that are none: need devices.name (capacity.name)",
    "capacity.max_mb=3.0": "max_mb 3 without a budget: need capacity.name=budget (capacity.max_mb)",
    "devices.name=phones": "devices 'phones' is not one of none, classes, lognormal, csv:<path> (devices.name)",
    "devices.name=csv:nowhere.csv": "no file nowhere.csv (devices.name)",
    "devices.deadline=3.0": "deadline 3.0 of devices that are none: need devices.name (devices.deadline)",
    "objective.name=mse": "objective 'mse' is not one of cross_entropy, squared_error (objective.name)",
    "adversary.name=fgsm": "adversary 'fgsm' is not one of none, pgd (adversary.name)",
    "foo.bar=1": "unknown config key 'foo.bar': 'foo' is not one of",
    "train.rounds=2.5": "train.rounds=2.5",
    "train.rounds": "has no value: --config.train.rounds=VALUE",
}

#: several changes at once
TOGETHER = [
    (["data.split=dirichlet_per_class", "data.concentration=0.0"], "Dirichlet concentration 0.0, allowed > 0"),
    (["data.split=shards", "data.classes_per_client=11"], "11 classes a client for 100 clients"),
    (["train.keep_momentum=True", "train.momentum=0.0"], "keep_momentum with momentum 0.0 of sgd: need sgd, > 0"),
    (["train.optimizer=adam", "train.optimizer_args.b1='x'"], "local optimizer 'adam': "),
    (["select.name=active", "select.args.dropped=2.0"], "dropped 2.0, allowed 0 <= d < 1 (select.args.dropped)"),
    (["select.name=active", "select.args.foo=1"], "argument 'foo' is not one of cohort, dropped"),
    (["devices.name=classes", "devices.args.mix='phone:1'"], "class 'phone' is not one of phone_2016, phone_2019"),
    (["devices.name=classes", "devices.args.mix='pi_4'"], "class 'pi_4' with '': need a whole number > 0"),
    (["devices.name=classes", "devices.args.efficiency=0.0"], "efficiency 0.0, allowed 0 < e <= 1"),
    (["devices.name=classes", "devices.args.foo=1"], "argument 'foo' is not one of mix, efficiency, spread of classes"),
    (["devices.name=lognormal", "devices.args.macs_per_s=-1.0"], "macs_per_s -1, allowed > 0 and finite"),
    (["devices.name=lognormal", "devices.args.speed_with_data=2.0"], "speed_with_data 2, allowed -1..1"),
    (["devices.name=lognormal", "devices.args.macs_per_s='x'"], "macs_per_s 'x', allowed a number"),
    (["devices.name=lognormal", "devices.online=nightly"], "online 'nightly': allowed always, daily:<hours> or csv:"),
    (["devices.name=lognormal", "devices.online=daily:30"], "daily:30 hours, allowed 0 < h <= 24 (devices.online)"),
    (["devices.name=lognormal", "devices.deadline=1e-9"], "deadline 1e-09 s drops everybody: the fastest client, "),
    (["devices.name=lognormal", "devices.deadline=-1.0"], "deadline -1, allowed > 0, or 0 for none (devices.deadline)"),
    (["devices.name=lognormal", "devices.first=11"], "first 11 of a cohort of 10, allowed 0..10 (devices.first)"),
    (["devices.name=lognormal", "devices.shift=0.0"], "shift 0 and spread 0: need one above 0 (devices.shift)"),
    (["devices.name=lognormal", "devices.spread=-1.0"], "spread -1, allowed >= 0 and finite (devices.spread)"),
    (["devices.name=lognormal", "capacity.name=budget", "capacity.max_seconds=1e-9"], "no client can afford any level"),
    (["devices.name=lognormal", "capacity.name=budget", "capacity.max_mb=-1.0"], "max_mb -1, allowed > 0"),
    (["devices.name=lognormal", "devices.concurrency=5"], "concurrency 5 below the 10 replies of a step"),
    (["devices.name=lognormal", "devices.concurrency=20", "devices.first=3"], "a deadline or first replies without"),
    (["devices.name=lognormal", "devices.concurrency=20", "method.name=ifca"], "this method plans more than who takes"),
    (["devices.name=lognormal", "method.name=cfl"], "works on the host between rounds: need none (devices.name)"),
    (["select.name=in_time", "select.args.of=uniform"], "limit 0.0 seconds, allowed > 0, by default devices.deadline"),
    (["uplink.name=qsgd", "uplink.args.levels=0"], "levels 0, allowed"),
    (["method.name=fedprox", "method.args.proximal_weight=-1.0"], "proximal weight -1.0, allowed >= 0"),
    (["method.name=feddyn", "method.args.feddyn_alpha=inf"], "feddyn_alpha inf, allowed a finite number"),
    (["method.name=scaffold", "train.momentum=0.0", "method.args.server_learning_rate=0.0"], "server learning rate 0"),
    (["method.name=fedavg", "method.args.server_optimizer.name=adamm"], "server optimizer 'adamm' is not one of sgd"),
    (["method.name=fedavg", "method.args.server_optimizer.learning_rate=-1.0"], "server learning rate -1.0, allowed >"),
]  # fmt: skip

#: arguments of the program
COMMANDS = [
    (["train", "--config=heterofl_digits:quick=maybe"], "config argument quick=maybe: allowed true or false"),
    (["train", "--config=heterofl_digits:colour=1"], "'colour' is not one of mix, quick"),
    (["train", "--config=heterofl_digit"], "no config file heterofl_digit, nor one of that name with the package"),
    (["train", "--seeds=a..b"], "--seeds 'a..b': allowed A..B with A <= B"),
    (["train", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    (["train", "--rounds=3"], "unknown argument '--rounds=3': did you mean --config.train.rounds?"),
    (["trane"], "invalid choice: 'trane'"),
    ([], "required: command"),
    (["eval", "nowhere"], "nowhere holds no run (no config.json)"),
    (["plot", "nowhere"], "nowhere holds no run (no config.json)"),
    (["export", "nowhere", "--level=a"], "nowhere holds no run (no config.json)"),
    (["config", "nowhere.py"], "no config file nowhere.py"),
    (["train", "--process=1"], "--processes and --process need --coordinator"),
]


def said_by(arguments, capsys):
    """The error, the one line on the way out; before it may stand which arguments of another method are dropped."""
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    *notes, line = lines
    assert all(note.endswith(": dropped (method.args)") for note in notes), notes
    assert line.startswith("hetfl: ")
    assert "Traceback" not in line
    return line


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab.rounds, "start", lambda *a: pytest.fail("the run began"))


@pytest.mark.parametrize("change", KEYS)
def test_a_wrong_value_on_the_command_line_is_one_line(change, capsys):
    assert KEYS[change] in said_by(["train", *SMALL, f"--config.{change}"], capsys)


@pytest.mark.parametrize(("changes", "line"), TOGETHER, ids=lambda v: v[0] if isinstance(v, list) else "")
def test_wrong_values_together_are_one_line(changes, line, capsys):
    told = said_by(["train", "--config=heterofl_digits:mix=a1", *SMALL, *(f"--config.{c}" for c in changes)], capsys)
    assert line in told


@pytest.mark.parametrize(("arguments", "line"), COMMANDS, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_wrong_arguments_are_one_line(arguments, line, capsys):
    assert line in said_by(arguments, capsys)


def data(rows=60, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(rows, 6)).astype(np.float32), rng.integers(0, 3, rows)
    return x[20:], y[20:], x[:20], y[:20]


class Net(nn.Module):
    """A net of the user's; what it returns is told by ``of``."""

    width: float = 1.0
    classes: int = 3
    of: str = "logits"

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(self.classes)(nn.relu(nn.Dense(int(8 * self.width))(x)))
        ways = {
            "logits": lambda: x, "one": lambda: x[:, 0], "dict": lambda: {"logits": x}, "none": lambda: None,
            "exits": lambda: jnp.stack([x, x]), "classes": lambda: x.argmax(-1, keepdims=True),
            "dropout": lambda: nn.Dropout(0.5, deterministic=False)(x), "shape": lambda: x.reshape(7, -1),
        }  # fmt: skip
        return ways[self.of]()


class Bare(nn.Module):
    def __call__(self, x):
        return x


class Needs(nn.Module):
    @nn.compact
    def __call__(self, x, mood):
        return nn.Dense(3)(x)


def by(**changes):
    """A partition of 4 clients with 10 rows each, changed."""
    return Partition(**({"rows": np.arange(40), "size": np.full(4, 10)} | changes))


#: what ``train`` is given in place of data of 3 classes and a small net -> a part of the line
GIVEN = {
    "no such block": ({"config": {"trian": {}}}, "config block 'trian' is not one of data, family"),
    "no such key": ({"config": {"train": {"round": 1}}}, "config key 'train.round' is not one of rounds, epochs"),
    "a config of another kind": ({"config": 5}, "config is a int: allowed a name, a file, a ConfigDict or a dict"),
    "a block of another kind": ({"config": {"train": 5}}, "train 5, allowed values by name (train)"),
    "text for a number": ({"train": {"rounds": "x"}}, "rounds 'x', allowed a whole number (train.rounds)"),
    "a fraction for a whole number": ({"train": {"rounds": 2.5}}, "rounds 2.5, allowed a whole number (train.rounds)"),
    "a bool for a number": ({"train": {"epochs": True}}, "epochs True, allowed a whole number (train.epochs)"),
    "nan": ({"train": {"momentum": float("nan")}}, "momentum nan, allowed a number (train.momentum)"),
    "nothing for text": ({"run": {"name": None}}, "name None, allowed text (run.name)"),
    "a number for a bool": ({"family": {"scaler": 1}}, "scaler 1, allowed True or False (family.scaler)"),
    "text in a tuple of numbers": ({"family": {"hidden": ("a",)}}, "hidden ('a',), allowed whole numbers (family.hid"),
    "a layer without units": ({"family": {"hidden": (0,)}}, "hidden (0,), allowed widths >= 1"),
    "a net that is too large": ({"family": {"hidden": (10**6, 10**6)}}, "do not fit into"),
    "an argument of another kind": (
        {"method": {"name": "qffl", "args": {"cohort": 2, "q": "much"}}},
        "q 'much', allowed a finite number (method.args.q)",
    ),
    "nan in an inner argument": (
        {"method": {"args": {"cohort": 2, "server_optimizer": {"name": "sgd", "learning_rate": float("nan")}}}},
        "learning_rate nan, allowed a number (method.args.server_optimizer.learning_rate)",
    ),
    "data of another kind": ({"data_": 3}, "data is a int: allowed (x_train, y_train, x_test, y_test)"),
    "three arrays": ({"data_": data()[:3]}, "data is a tuple: allowed (x_train, y_train, x_test, y_test)"),
    "data without labels": ({"data_": {"x_train": data()[0]}}, "data has no y_train"),
    "a nan in training": ({"data_": (np.full((40, 6), np.nan), *data()[1:])}, "x_train row 0 has NaN"),
    "an infinity in the test set": ({"data_": (*data()[:2], np.full((20, 6), np.inf), data()[3])}, "x_test row 0 has "),
    "a nan among labels": ({"data_": (data()[0], np.full(40, np.nan), *data()[2:])}, "y_train row 0 has NaN"),
    "labels too few": ({"data_": (data()[0], data()[1][:5], *data()[2:])}, "x_train has 40 rows, y_train has 5"),
    "labels to predict": ({"data_": (data()[0], data()[1] * 0.5, *data()[2:])}, "need objective.name=squared_error"),
    "an empty test set": ({"data_": (*data()[:2], np.zeros((0, 6)), np.zeros(0, int))}, "the test set is empty"),
    "a population alone": ({"data_": toy_population()}, "a Population alone has no test set"),
    "ids too few": ({"split": np.zeros(3)}, "split has 3 client ids for 40 training rows: need one each (split)"),
    "ids too many": ({"split": np.zeros(99)}, "split has 99 client ids for 40 training rows: need one each (split)"),
    "ids of two axes": ({"split": np.zeros((40, 2))}, "split has shape (40, 2): need one client id for each of 40"),
    "a split of another kind": ({"split": lambda *a: [1, 2]}, "the split gave a list: need a hetfl_jax.data.partition"),
    "rows beyond the data": ({"split": by(rows=np.arange(40) + 1)}, "rows names rows 1..40, allowed 0..39 (split)"),
    "sizes that do not add up": ({"split": by(size=np.full(4, 9))}, "size adds up to 36, rows has 40 rows"),
    "a client without rows": ({"split": by(size=np.array([0, 20, 10, 10]))}, "client 0 has 0 rows in size: need >= 1"),
    "test rows that are trained on": (
        {"split": by(test_index=np.arange(4), test_size=np.ones(4, int), held_out=True)},
        "training row 0 is test data too",
    ),
    "test rows without sizes": ({"split": by(test_index=np.arange(4))}, "test_index and test_size go together"),
    "a cohort above the clients": ({"method": {"args": {"cohort": 5}}}, "cohort of 5 clients, allowed 1..4"),
    "the class of a net": ({"net": Net}, "net is the class, not an instance: Net()"),
    "a net of another kind": ({"net": "mlp"}, "net is a str: need a linen module"),
    "a net with few outputs": ({"net": Net(classes=2)}, "labels 0..2, but the net has 2 outputs (family.net"),
    "a net with one axis": ({"net": Net(of="one")}, "net Net returns float32[1]: need floats [B, C]"),
    "a net that returns a dict": ({"net": Net(of="dict")}, "net Net returns dict: need floats [B, C]"),
    "a net that returns nothing": ({"net": Net(of="none")}, "net Net returns NoneType: need floats [B, C]"),
    "a net that returns classes": ({"net": Net(of="classes")}, "net Net returns int32[1, 1]: need floats [B, C]"),
    "exits that are no tuple": ({"net": Net(of="exits")}, "several exits are a tuple"),
    "dropout in evaluation": ({"net": Net(of="dropout")}, "net Net cannot read examples of shape (6,): Invalid"),
    "shapes that do not go together": ({"net": Net(of="shape")}, "net Net cannot read examples of shape (6,): "),
    "a net without parameters": ({"net": Bare()}, "net Bare has no parameters to train (family.net)"),
    "a net that needs more": ({"net": Needs()}, "missing 1 required positional argument: 'mood' (family.net)"),
    "a mix for a net without width": ({"net": nn.Dense(3), "family": {"mix": "a1-b1"}}, "sets width, which net"),
    "a method of another kind": ({"method_": 3}, "method is a int: need a name, a make, or an Algorithm (method)"),
    "a method that there is not": ({"method_": "nope"}, "method 'nope' is not one of"),
    "a metric of another kind": ({"metrics": [abs]}, "metrics is a list: allowed a dict of functions by name"),
    "a metric that is no function": ({"metrics": {"margin": 3}}, "metric 'margin' is a int: need a function"),
    "a metric by a taken name": ({"metrics": {"accuracy": abs}}, "metric 'accuracy': this name is taken"),
    "callbacks of another kind": ({"callbacks": print}, "callbacks is a builtin_function_or_method: allowed a list"),
    "a callback that is no function": ({"callbacks": [3]}, "callback 0 is a int: need a function (callbacks)"),
    "no run to resume": ({"resume": True}, "holds no run to go on with"),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_a_wrong_input_in_python_is_one_line(name, tmp_path):
    given, line = dict(GIVEN[name][0]), GIVEN[name][1]
    blocks = {
        "family": {"net": "mlp", "hidden": (8,), "norm": "none"}, "method": {"args": {"cohort": 2}},
        "data": {"clients": 4}, "train": {"rounds": 1, "devices": 1}, "run": {"folder": str(tmp_path)},
    }  # fmt: skip
    for block in blocks:
        blocks[block] = blocks[block] | given.pop(block, {})
    config = given.pop("config", blocks)
    named = {"data": given.pop("data_", data()), "method": given.pop("method_", None)}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        hf.train(config, quiet=True, **named, **given)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(Path(tmp_path).iterdir())


def one_round(algorithm, clients, population):
    store, key = hf.device_store(), jax.random.key(0)
    return hf.make_round(algorithm, hf.executor("bucketed"), store)(
        hf.start(algorithm, store, clients, key), population, key
    )[1]


def naming(*ids, **more):
    """FedAvg whose selection names these clients."""
    given = {name: jnp.asarray(value) for name, value in more.items()}
    some = select.stateless(lambda key, population: Cohort(jnp.array(ids), jnp.ones(len(ids), bool), **given))
    return fedavg.make(mlp_family(), sgd(), cohort=len(ids), slots=Slots(select=some))


def untold(clients=12):
    """Clients whose levels nobody told."""
    people = toy_population(clients)
    return hf.population(people.x, people.y, np.asarray(people.rows), np.asarray(people.size), classes=3)


def test_parts_that_do_not_fit_together_are_one_line():
    """Another number of clients, and levels that nobody told: a round would do something else without a word."""
    feddyn_of_12 = feddyn.make(mlp_family(), sgd(), cohort=2, clients_per_level=(6, 6))
    scaffold_of_9 = scaffold.make(mlp_family(), sgd(momentum=0.0), cohort=2, clients=9)
    kept = fedavg.make(mlp_family(), sgd(keep_momentum=True), cohort=2)
    for algorithm, clients, population, said in (
        (feddyn_of_12, 5, toy_population(12), "the method was made for 12 clients, but there are 5"),
        (scaffold_of_9, 9, toy_population(12), "the method was made for 9 clients, but there are 12"),
        (
            kept,
            5,
            toy_population(12),
            "client memory of 5 rows for a population of 12 clients: need start(..., 12",
        ),
        (
            fedavg.make(mlp_family(), sgd(), cohort=2),
            12,
            untold(),
            "the population was built for 1 level, the method",
        ),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            one_round(algorithm, clients, population)
        assert said in str(error.value)
        assert "\n" not in str(error.value)
    store = packed_device_store(Packing(np.zeros(7, int), ([(4,)],)), {"sum": jnp.zeros(4)})
    with pytest.raises(ValueError, match="a store of 7 rows of client memory, but 5 clients"):
        hf.start(kept, store, 5, jax.random.key(0))


def test_a_client_named_twice_is_left_out_and_counted():
    """An exact copy of an item would count twice; another stream makes it another draw."""
    assert one_round(naming(3, 3, 4), 12, toy_population()).refused == 1
    assert one_round(naming(3, 3, 99, stream=[0, 1, 0]), 12, toy_population()).refused == 1


def test_a_run_stops_in_the_round_that_names_nobody(tmp_path, monkeypatch):
    monkeypatch.undo()
    called = []
    algorithm = naming(1, 11)
    blocks = {
        "family": {"net": "mlp", "hidden": (8,), "norm": "none", "mix": "a1-b1"}, "method": {"args": {"cohort": 2}},
        "data": {"clients": 4}, "train": {"rounds": 40, "devices": 1},
        "run": {"folder": str(tmp_path), "eval_every": 40},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"round 1: the selection named 1 clients outside 0\.\.3"):
        hf.train(blocks, data=data(), method=algorithm, quiet=True, callbacks=[lambda *a: called.append(a[0])])
    assert called == [0]
    blocks["select"] = {"name": "uniform"}
    with pytest.raises(ValueError, match="an algorithm is whole, select 'uniform' is not in it: need none"):
        hf.train(blocks, data=data(), method=algorithm, quiet=True, overwrite=True)


@pytest.mark.parametrize("seeds", [[], [0, 0], 3, "01"])
def test_seeds_are_whole_numbers_each_once(seeds, tmp_path):
    with pytest.raises(ValueError, match="need some whole numbers >= 0, each once"):
        hf.over_seeds({"run": {"folder": str(tmp_path)}}, seeds)
