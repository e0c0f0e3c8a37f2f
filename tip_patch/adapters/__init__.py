"""Token selection inside other trainers."""
