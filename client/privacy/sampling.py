"""Poisson sampling of patients: every patient tosses his own coin in every step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from client.privacy.noise import SecureNoise


def sample_patients(noise: SecureNoise, patients: int, sampling_rate: float) -> NDArray[np.int64]:
    """The indices of the patients in this step, ascending; possibly none.

    Guarantee: each of `patients` is in with probability `sampling_rate`, independently of the
    others. The sample's size is secret and random; nothing public may be derived from it.
    """
    return np.flatnonzero(noise.bernoulli(patients, sampling_rate)).astype(np.int64, copy=False)
