"""The published name of `opsd.selection`: what a selector of your own imports."""

from opsd.selection import (
    ALL_TOKENS,
    Selection,
    TokenSelector,
    TokenStats,
    TokenTelemetry,
    describe_selectors,
    load_selector,
    load_telemetry,
    selector_names,
)

__all__ = [
    "ALL_TOKENS",
    "Selection",
    "TokenSelector",
    "TokenStats",
    "TokenTelemetry",
    "describe_selectors",
    "load_selector",
    "load_telemetry",
    "selector_names",
]
