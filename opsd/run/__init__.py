"""What a run writes and reads again: its folder, checkpoints, token records, and where metrics go."""
