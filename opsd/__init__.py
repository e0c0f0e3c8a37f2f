"""On-policy distillation: a student writes, a frozen teacher scores every token, the student learns."""

__version__ = "0.2.0"
