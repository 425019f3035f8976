"""Learning rate by step: a pure function, so that nothing of it needs saving."""

from __future__ import annotations

import math

from cmkd_scale.config_sections import TrainConfig


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Learning rate of a step, counted from 0.

    Linear warm-up, then by ``config.schedule``: ``cosine``, to zero at the last step (Loshchilov
    and Hutter 2017); ``wsd``, constant and at the end ``1 - sqrt`` to zero (Hägele et al. 2024).
    """
    warmup = min(config.warmup_steps, config.steps - 1)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "cosine":
        progress = (step - warmup) / (config.steps - warmup)
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    decay = max(1, min(config.steps - warmup, round(config.decay_fraction * config.steps)))
    done = step - (config.steps - decay)
    return config.learning_rate * (1.0 - math.sqrt(max(0, done) / decay))
