"""Trials: damaged files, odd command lines, wrong arguments, killed trainings: `python -m tests.trials` counts them."""
