"""Prompts and how they become token ids."""
