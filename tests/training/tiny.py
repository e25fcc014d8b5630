"""A training of a second."""

import dataclasses

from normfree.training import RECIPES

TINY = dataclasses.replace(
    RECIPES["digits"], model_args=("width=0.25",), epochs=1, batch=96, log_every=4, checkpoint_every=0
)
