"""What a run may use of the machine: cores, the compilation cache, and other hosts. Called before jax starts."""

import os
import shutil
import warnings
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from hetfl_jax.core import platform

_HEARTBEAT = 40  # seconds after which a silent host is lost, as XLA's collectives have it; jax waits for 100
CACHE = "HETFL_CACHE"  #: environment variable: the folder of compiled programs


def cores() -> int:
    """CPU cores that this process may use: those it is pinned to.

    >>> cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores() -> None:
    """One CPU device a core, over which clients are spread; on an accelerator this changes nothing.

    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, {"XLA_FLAGS": ""}), mock.patch.object(jax.config, "update") as update:
    ...     use_all_cores()
    >>> update.call_args.args == ("jax_num_cpu_devices", cores())
    True
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", cores())


def warn_of_idle_cores() -> None:
    """Tell users of the library what the command line does by itself.

    >>> from unittest import mock
    >>> alone = mock.patch.multiple(jax, default_backend=lambda: "cpu", device_count=lambda: 1)
    >>> eight = mock.patch(f"{cores.__module__}.cores", lambda: 8)
    >>> with alone, eight, warnings.catch_warnings(record=True, action="always") as said:
    ...     warn_of_idle_cores()
    >>> str(said[0].message).partition(":")[0]
    'one CPU device for 8 cores'
    """
    if jax.default_backend() == "cpu" and jax.device_count() == 1 < cores():
        warnings.warn(
            f"one CPU device for {cores()} cores: call jax.config.update('jax_num_cpu_devices', {cores()}) before jax "
            "starts, and clients are spread over them",
            stacklevel=3,
        )


def use_cache() -> Path:
    """Keep compiled programs in a folder of the user's, so that the next run loads them; returns the folder.

    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, {CACHE: "compiled"}), mock.patch.object(jax.config, "update") as update:
    ...     use_cache().name, update.call_args_list[0].args
    ('compiled', ('jax_compilation_cache_dir', 'compiled'))
    """
    folder = Path(os.environ.get(CACHE, Path.home() / ".cache" / "hetfl_jax"))
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    return folder


def use_cache_once() -> None:
    """``use_cache``, unless a folder of compiled programs was chosen already."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        use_cache()


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other hosts of a run: every host starts the same command.

    Args:
      coordinator: ``HOST:PORT`` of the first host, with ``processes`` and ``process`` (this one's number, from 0);
        ``auto`` on TPU pods, Slurm and Kubernetes, where jax finds the others by itself.

    Raises:
      ValueError: numbers that do not fit, before anything waits for another host.
    """
    if coordinator is None:
        if processes is not None or process is not None:
            raise ValueError("--processes and --process need --coordinator=HOST:PORT")
        return
    if coordinator == "auto":
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT)
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator={coordinator}: allowed auto or HOST:PORT, the first host's address")
    if processes is None or process is None or not 0 <= process < processes:
        raise ValueError(f"--processes={processes} --process={process}: need 0 <= process < processes")
    jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=_HEARTBEAT)


def wait_for_all(name: str) -> None:
    """Go on when every process has come here; with one process, at once.

    Args:
      name: of the place, the same in all of them.

    >>> wait_for_all("nothing to wait for")
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def is_first() -> bool:
    """Whether this process writes what is written once.

    >>> is_first()  # of one process
    True
    """
    return jax.process_index() == 0


def host_memory() -> int:
    """Bytes of main memory that are free for use.

    >>> host_memory() > 0
    True
    """
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_memory() -> int:
    """Bytes of one device's memory, of the platform that is traced for; of the host where devices are its cores.

    >>> device_memory() > 0
    True
    """
    here = platform.current()
    if here.memory:
        return here.memory
    stats = jax.local_devices()[0].memory_stats() if here.name != "cpu" else None
    return int(stats["bytes_limit"]) if stats else host_memory()


def free_disk(folder: str) -> int:
    """Free bytes where a folder is or will be.

    Args:
      folder: it need not be there; the nearest one above it that is counts.

    >>> free_disk("no/such/folder") > 0
    True
    """
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
