"""Math problem sets as prompt files: sources, cleaning, counts."""
