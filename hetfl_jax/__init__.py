"""hetfl_jax."""
