"""The cells of a table: scripts/run_cells.py runs several at a time, this package shows their progress."""
