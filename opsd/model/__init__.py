"""Models: loading, what is checked on them, and hidden states instead of logits."""
