"""Parts of scripts/gpu_check.py: a module per stage, each with a function of a `Check`."""
