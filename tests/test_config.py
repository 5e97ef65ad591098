"""Configs: defaults once, every key on every config, and what is said of what is not understood."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hetfl_jax import load_config, methods
from hetfl_jax.parts.local import OPTIMIZERS, local
from hetfl_jax.run.cli import main
from hetfl_jax.run.config import complete, config_names
from hetfl_jax.run.export import evaluate_run, load_exported, open_config
from hetfl_jax.run.keys import KEYS
from hetfl_jax.run.lab import prepare
from hetfl_jax.run.mix import parse_buckets, parse_mix
from hetfl_jax.run.train import train

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", config_names())
def test_every_key_is_on_every_config(name):
    config = load_config(name)
    assert {block: set(keys) for block, keys in KEYS.items()} == {block: set(config[block]) for block in config}
    assert load_config(name, "uplink.name=qsgd", "data.options.alpha=0.5").data.options.alpha == 0.5


@pytest.mark.parametrize("method", methods.names())
def test_any_method_on_any_config(method):
    """Its arguments have defaults, and those of the former method are dropped with one line."""
    said = []
    config = load_config("heterofl_digits", f"method.name={method}", tell=said.append)
    assert config.method.args.get("cohort", 10) == 10  # all take part in lag
    assert "mask" not in config.method.args or method == "heterofl"
    assert len(said) == (method not in ("heterofl",)), said
    dropped = r"has no argument assignment,( cohort,)? mask: dropped \(method\.args\)"
    assert all(re.search(dropped, line) for line in said if "mask" in line), said


def test_a_value_is_typed_as_its_default():
    config = load_config(
        "heterofl_digits", "train.rounds=3", "--config.family.hidden=(4,4)", "select.args.candidates=20"
    )
    assert (config.train.rounds, config.family.hidden, config.select.args.candidates) == (3, (4, 4), 20)
    for change, said in (
        ("train.rounds=x", "invalid literal"),
        ("train.round=3", "unknown config key 'train.round'"),
        ("training.rounds=3", "'training' is not one of .*capacity, data"),
        ("method.args.cohorts=3", "'cohorts' is not one of"),
        ("train.rounds", "has no value"),
        ("method.name=nope", "method 'nope' is not one of afl, cfl"),
    ):
        with pytest.raises(ValueError, match=said):
            load_config("heterofl_digits", change, tell=lambda text: None)
    with pytest.raises(FileNotFoundError, match="heterofl_digits"):
        load_config("heterofl_digit")


def test_the_commands_show_configs_and_names(capsys):
    assert main(["config", "heterofl_digits", "--config.train.rounds=7"]) == 0
    shown = capsys.readouterr().out
    assert "rounds                7 " in shown
    assert all(f"  {key} " in shown for keys in KEYS.values() for key in keys)
    assert all(about.meaning in shown for keys in KEYS.values() for about in keys.values())
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in ("heterofl_digits", "inclusivefl", "resnet18_exits", "dirichlet_per_class", "power_of_choice", "qsgd"):
        assert name in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds=3"], "unknown argument '--rounds=3': did you mean --config.train.rounds?"),
        (["--seed", "3"], "did you mean --config.data.seed or --config.run.seed?"),
        (["--nonsense"], "unknown argument '--nonsense'"),
    ],
)
def test_an_argument_without_its_block_is_answered_with_it(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(["train", *arguments])
    assert said in capsys.readouterr().err


def test_a_config_is_named_with_a_space_too(tmp_path, capsys):
    folder = ["--config.run.folder", str(tmp_path)]
    assert main(["train", "--config", "heterofl_digits:quick", *folder, "--config.family.net=mlp", "--dry-run"]) == 0
    assert "10 clients" in capsys.readouterr().out


def test_levels_of_any_width():
    mix = parse_mix("w1x2-w0.75x1-w0.5x1")
    assert (mix.names, mix.widths, mix.proportions) == (("w1", "w0.75", "w0.5"), (1.0, 0.75, 0.5), (2, 1, 1))
    assert parse_mix("w0.8x1-w0.4x1").widths == (1.0, 0.5)
    assert parse_buckets("w1-w0.75w0.5", mix) == ((0,), (1, 2))
    for text, said in (
        ("w2x1", "width 2 in mix"),
        ("w0x1", "width 0 in mix"),
        ("w0.5x1-w1x1", "above the global level"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_mix(text)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_local_optimizers_by_their_name_in_optax(name):
    """A step without decay is optax's own; adamw decays apart from the gradient."""
    params, gradient = {"a": jnp.array([1.0, -2.0])}, {"a": jnp.array([0.5, 0.25])}
    rule = local(learning_rate=0.1, batch_size=1, optimizer=name).optimizer(0.1, 0.0)
    make = getattr(optax, name)
    plain = make(0.1, weight_decay=0.0) if name in ("adamw", "lamb", "lion", "nadamw") else make(0.1)
    found, wanted = (r.update(gradient, r.init(params), params)[0] for r in (rule, plain))
    np.testing.assert_allclose(found["a"], wanted["a"], rtol=1e-6)
    if name == "adamw":
        decayed = local(learning_rate=0.1, batch_size=1, optimizer=name, weight_decay=0.5).optimizer(0.1, 0.0)
        step = decayed.update(gradient, decayed.init(params), params)[0]
        np.testing.assert_allclose(step["a"] - found["a"], -0.1 * 0.5 * params["a"], rtol=1e-5)
    with pytest.raises(ValueError, match=r"argument 'rate' is not one of .*train.optimizer_args"):
        local(learning_rate=0.1, batch_size=1, optimizer=name, optimizer_args={"rate": 1})


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ({"schedule": "constant"}, [1.0, 1.0, 1.0, 1.0]),
        ({"milestones": (1, 3), "decay_factor": 0.5}, [1.0, 0.5, 0.5, 0.25]),
        ({"schedule": "cosine", "rounds": 4}, [1.0, 0.8535534, 0.5, 0.1464466]),
        ({"schedule": "constant", "warmup_rounds": 2}, [0.5, 1.0, 1.0, 1.0]),
        ({"schedule": lambda t: 1.0 / (t + 1)}, [1.0, 0.5, 1 / 3, 0.25]),
    ],
)
def test_schedules_of_the_learning_rate(schedule, wanted):
    rate = local(learning_rate=1.0, batch_size=1, **schedule).learning_rate
    np.testing.assert_allclose([float(rate(jnp.int32(t))) for t in range(4)], wanted, rtol=1e-6)


def test_the_split_keeps_its_seed():
    labs = {}
    for name, changes in (("a", ["run.seed=0"]), ("b", ["run.seed=1"]), ("c", ["run.seed=1", "data.seed=0"])):
        labs[name] = prepare(load_config("heterofl_digits:mix=a1,quick", "family.net=mlp", "train.devices=1", *changes))
    rows = {name: lab.federation.partition.rows for name, lab in labs.items()}
    assert (rows["a"] == rows["c"]).all()
    assert (rows["a"] != rows["b"]).any()
    assert jax.random.key_data(labs["a"].key).tolist() != jax.random.key_data(labs["c"].key).tolist()


def test_a_run_of_the_version_before_is_read(tmp_path):
    """Its config lacks keys, its checkpoint what a selection remembers; it goes on, and its export opens."""
    with tarfile.open(ROOT / "tests" / "files" / "run_of_0_1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "before"
    text = evaluate_run(folder)
    assert "level a: accuracy 0.2944, local accuracy 0.2889, loss 2.1048" in text
    config = open_config(folder)
    with config.unlocked():
        config.run.folder, config.train.rounds = str(tmp_path), 3
    resumed = train(config, resume=True, quiet=True)
    assert resumed.summary["rounds"] == 3
    assert resumed.summary["down_bytes"] > 15_000
    fields, variables = load_exported(folder / "level_b.npz")
    assert variables["params"]["head"]["kernel"].shape == (4, 10)
    assert fields["hidden"] == [8]


def test_a_config_of_plain_dicts_is_completed():
    config = complete({"train": {"rounds": 2}, "method": {"name": "fedavg", "args": {"cohort": 3}}})
    assert (config.train.rounds, config.method.args.cohort, config.data.clients) == (2, 3, 100)
    with pytest.raises(ValueError, match="block 'training' is not one of"):
        complete({"training": {}})


def test_the_wheel_holds_configs_and_types(tmp_path):
    """What pip installs finds its configs from any folder."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "hetfl_jax", source / "hetfl_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "configs", source / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(tmp_path / "installed")
    assert "hetfl_jax/py.typed" in names
    assert {f"hetfl_jax/configs/{name}.py" for name in config_names()} <= names
    command = [sys.executable, "-m", "hetfl_jax", "config", "heterofl_digits"]
    env = {"PYTHONPATH": str(tmp_path / "installed"), "PATH": "", "JAX_PLATFORMS": "cpu"}
    shown = subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout
    assert "'heterofl'" in shown
