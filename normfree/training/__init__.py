"""Training: recipes, one engine from a laptop to a cluster, and what a run leaves behind."""

from normfree.signal.monitor import SignalMonitor
from normfree.training.engine import Result, train
from normfree.training.evaluation import evaluate_run, load_run
from normfree.training.recipes import RECIPES, Recipe, recipe

__all__ = ["RECIPES", "Recipe", "Result", "SignalMonitor", "evaluate_run", "load_run", "recipe", "train"]
