"""Worlds in which an answer takes several turns and tools: travel planning."""
