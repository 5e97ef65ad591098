"""Every file in the vector folder is known: it has a handler, or stands in the table of methods not built yet."""

import fnmatch
import os

import pytest

from tests.vectors.discover import FOLDER, NOT_BUILT, present

pytestmark = pytest.mark.vectors

HANDLED = (
    "width/o1?_heterofl_*",
    "width/o2?_heterofl_*_forward",
    "width/o2?_heterofl_sbn_*",
    "width/o2?_heterofl_local_train_*",
    "width/o3?_heterofl_transformer*",
    *(f"width/o5?_fjord_{kind}*" for kind in ("aggregate_", "forward", "step_")),
    *(
        f"width/o4?_splitmix_{kind}*"
        for kind in (
            "ensemble_",
            "aggregate",
            "sheterofl_aggregate",
            "dbn_lambda",
            "masked_ce",
            "pgd",
            "base_sampling_trace",
            "lr",
        )
    ),
    *(
        f"depth/depthfl_{kind}*"
        for kind in (
            "forward",
            "local_loss",
            "local_train_",
            "aggregate_",
            "schedule",
            "eval",
            "partition",
            "param_counts",
        )
    ),
    "depth/feddyn_client_step*",
    "depth/feddyn_rounds_*",
    "depth/inclusivefl_aggregate*",
    "depth/inclusivefl_momentum_corrected_*",
    *(f"cluster/ifca_{kind}*" for kind in ("mlp_", "synth_", "data", "weighted_agg", "rotmnist_")),
    "cluster/cfl_*",
    *(
        f"selection/{kind}*"
        for kind in (
            "qffl_aggregate",
            "qffl_end_to_end",
            "divfl_greedy",
            "divfl_end_to_end",
            "power_of_choice",
            "fairness_metrics",
            "synthetic_alpha_beta",
            "qsgd_",
            "lag_",
        )
    ),
)


def unknown(names):
    return [n for n in names if not any(fnmatch.fnmatch(n, kind) for kind in (*HANDLED, *NOT_BUILT))]


def test_every_file_has_a_handler_or_a_reason():
    if not FOLDER.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI needs the reference vectors in {FOLDER} (HETFL_VECTORS)")
        pytest.skip(f"no reference vectors in {FOLDER}; HETFL_VECTORS names their folder")
    assert present(), FOLDER
    assert not unknown(present())


def test_an_unknown_kind_is_found():
    assert unknown(["width/o9a_new_thing", "width/o1z_heterofl_mlp_full"]) == ["width/o9a_new_thing"]
