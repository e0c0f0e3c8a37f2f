"""What scripts/report.py is made of: run folders in, tables, figures and a page out."""
