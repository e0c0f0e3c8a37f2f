"""Models: loading them, what is measured on them before they serve, adapters."""
