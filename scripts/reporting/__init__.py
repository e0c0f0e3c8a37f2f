"""Parts of scripts/report.py: from run folders to tables, figures and a page."""
