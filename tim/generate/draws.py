"""What is drawn for a picture, from (seed, item, picture index) alone and always on the CPU.

Each draw has a key of its own, the SHA-256 of what it is for.
"""

import hashlib
import json

import numpy as np
import torch
from torch import Tensor


def noise(seed: int, item: str, index: int, shape: tuple[int, ...]) -> Tensor:
    """The initial noise of variance 1, float32."""
    return torch.from_numpy(_numpy(seed, item, index, "noise").standard_normal(shape, np.float32))


def label(seed: int, item: str, num_classes: int) -> int:
    """A class, all alike in probability."""
    return int(_numpy(seed, item, 0, "label").integers(num_classes))


def step_generator(seed: int, item: str, index: int) -> torch.Generator:
    """Of the noise that a stochastic sampler adds."""
    return torch.Generator().manual_seed(_key(seed, item, index, "steps") % 2**32)


def _numpy(seed: int, item: str, index: int, what: str) -> np.random.Generator:
    # All of the key counts here. Of a seed of torch's only 32 bits do: with the 50,000 pictures of
    # ImageNet, two would have the same noise in one folder out of four.
    return np.random.Generator(np.random.PCG64(_key(seed, item, index, what)))


def _key(seed: int, item: str, index: int, what: str) -> int:
    text = json.dumps([seed, item, index, what])
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
