"""Eight virtual devices for every test, set before jax starts; a compilation cache that all workers of a run share."""

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
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # small programs are most of them

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.helpers import forget_programs  # noqa: E402

jax.config.update("jax_disable_most_optimizations", True)  # also for fixtures of a module, which are made earlier


@pytest.fixture(autouse=True)
def quick_compile(request):
    """Most tests compile without optimisation, since compiling is what they cost; ``as_users`` marks the others."""
    as_users = request.node.get_closest_marker("as_users") is not None
    jax.config.update("jax_disable_most_optimizations", not as_users)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def small_worker():
    """A module's programs go with it: a worker stays small, and the next module loads what it shares from the cache."""
    yield
    forget_programs()
