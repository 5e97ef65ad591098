"""``python -m hetfl_jax``: the command ``hetfl``."""

import sys

from hetfl_jax.run.cli import main

if __name__ == "__main__":
    sys.exit(main())
