"""Turns prompt files into token ids, and rollouts into micro-batches."""
