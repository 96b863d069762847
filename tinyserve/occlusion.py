"""Where a model looked, for any model: cover a place, and see what that costs.

Occlusion (Zeiler and Fergus, 2014) needs nothing but the probabilities, so it works on every
graph. A soft spot in the picture's mean colour stands, one after another, on every point of a grid;
a place matters as far as the probability of the class falls when it is covered.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinyserve.engine import Engine

GRID = 11
"""Spots in a row and in a column: so many, squared, variants of the picture are classified."""
SPREAD = 0.1
"""Standard deviation of a spot, in sides of the picture: large enough to hide a part of a thing,
small enough to tell parts from each other."""
BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Occlusion:
    """What covering parts of one picture did to the probability of one class."""

    heat: NDArray[np.float32]
    """How much the probability falls when the place of a pixel is covered: ``(size, size)``, 1 to
    -1; negative where the class gets likelier, that is, where something speaks against it."""
    probability: float
    """Of the class, with nothing covered."""
    lowest: float
    """Of the class, with the spot where it hurts most."""


def occlude(engine: Engine, image: NDArray[np.uint8], index: int) -> Occlusion:
    """Where the evidence for class ``index`` lies in ``image``.

    ``image`` is uint8 ``(size, size, 3)``, as :func:`tinyserve.images.load` gives it. Takes
    the time of :data:`GRID` squared images.
    """
    spots = _spots(len(image))
    mean = image.mean(axis=(0, 1), dtype=np.float32)
    probability = float(engine.run(image[None])[0, index])
    remaining = np.empty(len(spots), np.float32)
    for start in range(0, len(spots), BATCH_SIZE):
        cover = spots[start : start + BATCH_SIZE, :, :, None]
        covered = image + cover * (mean - image)
        batch = np.rint(covered).astype(np.uint8)
        remaining[start : start + len(batch)] = engine.run(batch)[:, index]
    # Every pixel gets the mean over the spots, weighted by how much of it each one hid.
    heat = np.tensordot(probability - remaining, spots, axes=1) / spots.sum(axis=0)
    return Occlusion(heat.astype(np.float32), probability, float(remaining.min()))


def _spots(size: int) -> NDArray[np.float32]:
    """How much of each pixel each spot hides, 0 to 1: ``(GRID * GRID, size, size)``."""
    pixels = (np.arange(size) + 0.5) / size
    centres = (np.arange(GRID) + 0.5) / GRID
    distances = (pixels - centres[:, None]) / SPREAD
    profiles = np.exp(-(distances**2) / 2).astype(np.float32)
    spots: NDArray[np.float32] = np.einsum("iy,jx->ijyx", profiles, profiles)
    return spots.reshape(GRID * GRID, size, size)
