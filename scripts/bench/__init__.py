"""Parts of scripts/bench_loss.py and scripts/bench_step.py."""
