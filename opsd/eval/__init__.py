"""Evaluation: suites, the answers of a model, and their grades."""
