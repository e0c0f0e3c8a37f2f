"""Math problem sets as files of prompts: where they come from, how they are cleaned, what is counted."""
