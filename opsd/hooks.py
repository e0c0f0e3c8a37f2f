"""The published name of `opsd.selection`: what a selector of your own imports."""

from opsd.selection import ALL_TOKENS as ALL_TOKENS
from opsd.selection import Selection as Selection
from opsd.selection import TokenSelector as TokenSelector
from opsd.selection import TokenStats as TokenStats
from opsd.selection import TokenTelemetry as TokenTelemetry
from opsd.selection import describe_selectors as describe_selectors
from opsd.selection import load_selector as load_selector
from opsd.selection import load_telemetry as load_telemetry
from opsd.selection import selector_names as selector_names
