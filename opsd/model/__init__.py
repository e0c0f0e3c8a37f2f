"""Models: how they are loaded and checked, and how they give hidden states instead of logits."""
