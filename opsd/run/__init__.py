"""What a run writes and reads: its folder, checkpoints, token records, and trackers for metrics."""
