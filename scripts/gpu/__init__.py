"""What scripts/gpu_check.py is made of: a module per stage, each a function of a `Check`."""
