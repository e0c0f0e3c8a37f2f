"""The cells of a table, several at a time: scripts/run_cells.py starts them, this shows how far they are."""
