"""What a local step costs on each kind of device. The command below makes a row; buckets are chosen by them.

``python -m experiments.throughput.constants`` measures this machine's device; with ``--target=v5e:2x2`` it reads them
from what a TPU's compiler plans.
"""

from typing import NamedTuple


class Constants(NamedTuple):
    """Seconds of a local step of ``c`` clients at once: ``launch * layers + c * multiply-adds / rate``."""

    launch: float  #: seconds of one layer's part of a local step (forward and backward), however small it is
    rate: float  #: multiply-adds a second
    program: float  #: seconds that one more bucket takes to compile, once a run


CONSTANTS = {
    "cpu": Constants(launch=2e-5, rate=25e9, program=3.0),
    "gpu": Constants(launch=3e-5, rate=10e12, program=3.0),
    "tpu": Constants(launch=3e-5, rate=2e12, program=5.0),
}
