"""The random words of codecs in plain whole numbers."""

import jax
import numpy as np


def mixed(value):
    """The hash of ``core.random`` on whole numbers of any size, cut to 32 bits after each step."""
    value = value * 0x9E3779B1 % 2**32
    value = (value ^ value >> 15) * 0x85EBCA77 % 2**32
    value = (value ^ value >> 13) * 0xC2B2AE3D % 2**32
    return value ^ value >> 16


def words_of(key, number, shape):
    """A leaf's random words: by its place in the full tree and each entry's place in the full leaf."""
    first, second = map(int, jax.random.bits(jax.random.fold_in(key, number), (2,)))
    full = [mixed(mixed((place + first) % 2**32) ^ second) for place in range(int(np.prod(shape)))]
    return np.array(full, np.int64).reshape(shape)


def uniform_of(word):
    """In [0, 1), from the upper 24 bits."""
    return (word // 256) / 2.0**24
