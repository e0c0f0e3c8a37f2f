"""Prompt files to token ids, and rollouts to micro-batches."""
