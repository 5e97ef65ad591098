"""For all tests and doctests: eight virtual devices, set before jax starts, and what keeps a worker quick and small."""

import gc
import os
import tempfile
from importlib.metadata import version

_flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if version("jaxlib").startswith("0.10."):  # XLA stops at a flag that it does not know
    # The older code generator, in one piece a program, compiles in half the time.
    _flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join(_flags)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_cache = tempfile.TemporaryDirectory(prefix="hetfl_jax_tests_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _cache.name)
os.environ.setdefault("HETFL_CACHE", os.environ["JAX_COMPILATION_CACHE_DIR"])  # of processes that tests start
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # small programs are most of them

import jax  # noqa: E402
import pytest  # noqa: E402

from hetfl_jax.results import plots  # noqa: E402
from tests.helpers import forget_programs, resident_megabytes  # noqa: E402

jax.config.update("jax_disable_most_optimizations", True)  # also for fixtures of a module, which are made earlier
# Tracing makes many small objects and few circles: looking for those less often saves a tenth of it.
gc.collect()
gc.freeze()
gc.set_threshold(20_000, 20, 50)

_plot, _no_plot = plots.plot, lambda *args, **options: []
plots.plot = _no_plot  # a third of a short run's time; tests of figures are marked ``draws``


@pytest.fixture(autouse=True)
def draws(request):
    """Runs draw no figures, but in tests that are marked ``draws``."""
    plots.plot = _plot if request.node.get_closest_marker("draws") else _no_plot
    yield
    plots.plot = _no_plot


@pytest.fixture(autouse=True)
def quick_compile(request):
    """Most tests compile without optimisation, since compiling is what they cost; ``as_users`` marks the others."""
    as_users = request.node.get_closest_marker("as_users") is not None
    jax.config.update("jax_disable_most_optimizations", not as_users)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def small_worker():
    """Programs of earlier modules go once a worker is large; what is needed again comes from the cache."""
    yield
    if resident_megabytes() > 900:
        forget_programs()
