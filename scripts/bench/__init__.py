"""What scripts/bench_loss.py is made of."""
