"""Training: recipes, one engine from a laptop to a cluster, and the folder that a run leaves behind."""

from normfree.extras import require_extra

require_extra("train", "training")

from normfree.signal.monitor import SignalMonitor
from normfree.training.engine import Result, train
from normfree.training.recipes import RECIPES, Recipe, recipe
from normfree.training.run.restored import evaluate_run, load_run

__all__ = ["RECIPES", "Recipe", "Result", "SignalMonitor", "evaluate_run", "load_run", "recipe", "train"]
