"""``python -m hetfl_jax.train --config=...``: the same as ``hetfl train``.

Only an entry point: ``hetfl_jax.train`` in a program is the function of ``hetfl_jax.run``.
"""

import sys

if __name__ == "__main__":
    from hetfl_jax.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
