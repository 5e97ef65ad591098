"""Eight virtual devices for every test, set before jax starts; a compilation cache that all workers of a run share."""

import os
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_cache = tempfile.TemporaryDirectory(prefix="hetfl_jax_tests_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _cache.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax  # noqa: E402
import pytest  # noqa: E402

TOYS = ("test_contract", "test_identities", "test_bank", "test_heterofl_vectors", "test_cluster_vectors")


@pytest.fixture(autouse=True)
def quick_compile(request):
    """Toy MLPs are compiled without optimisation, since compiling is what they cost; convolutions as users run them."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    image = getattr(params.get("row"), "image", False)
    module = request.module.__name__.rpartition(".")[2] if request.module else ""
    toy = module in TOYS and not image and "mnist" not in request.node.name
    jax.config.update("jax_disable_most_optimizations", toy)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
