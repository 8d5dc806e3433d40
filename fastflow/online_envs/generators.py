"""States of NumPy's random generators as plain arrays of unsigned integers."""

from __future__ import annotations

import numpy as np

__all__ = ["generator_state", "random_state", "set_generator_state", "set_random_state"]

_WORD = (1 << 64) - 1


def generator_state(generator: np.random.Generator) -> np.ndarray | None:
    """State of a PCG64 generator, uint64 [6]: two 128-bit numbers in halves, high first, and the spare 32 bits; None
    for another kind of generator."""
    state = generator.bit_generator.state
    if state["bit_generator"] != "PCG64":
        return None
    numbers = (state["state"]["state"], state["state"]["inc"])
    words = [word for number in numbers for word in (number >> 64, number & _WORD)]
    return np.array([*words, state["has_uint32"], state["uinteger"]], dtype=np.uint64)


def set_generator_state(generator: np.random.Generator, words: np.ndarray) -> None:
    """Gives a PCG64 generator the state that `generator_state` returned."""
    numbers = [int(word) for word in words]
    generator.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": numbers[0] << 64 | numbers[1], "inc": numbers[2] << 64 | numbers[3]},
        "has_uint32": numbers[4],
        "uinteger": numbers[5],
    }


def random_state(random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """State of the legacy generator (MT19937): uint32 [626], and the spare normal number, float64 []."""
    _, key, position, has_gauss, gauss = random.get_state(legacy=True)
    return np.array([*key, position, has_gauss], dtype=np.uint32), np.array(gauss, dtype=np.float64)


def set_random_state(random: np.random.RandomState, words: np.ndarray, gauss: np.ndarray) -> None:
    """Gives the legacy generator the state that `random_state` returned."""
    key = np.asarray(words[:-2], dtype=np.uint32)
    random.set_state(("MT19937", key, int(words[-2]), int(words[-1]), float(gauss)))
