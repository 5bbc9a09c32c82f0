"""Pistonball (pip install "pettingzoo[butterfly]" supersuit): grey, 20 x 20, 2 frames: --env-id zoo:zoo_pistonball."""

import numpy as np
import supersuit
from pettingzoo.butterfly import pistonball_v6


def parallel_env(size=20, frames=2, continuous_actions=True, **options):
    env = pistonball_v6.parallel_env(continuous=continuous_actions, **options)
    env = supersuit.resize_v1(supersuit.color_reduction_v0(env, "full"), size, size)
    env = supersuit.flatten_v0(supersuit.frame_stack_v1(env, frames))
    return supersuit.normalize_obs_v0(supersuit.dtype_v0(env, np.float32))
