"""What a local step costs on each kind of device; buckets are chosen by it.

The rows are rough fits to figures of experiments/throughput/README.md (CPU, GPU); the TPU's is a guess.
``python -m experiments.throughput.constants`` measures those of this machine's device.
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
