"""Loads and checks all parts of a run before anything is written."""

from opsd.build.assembly import Parts as Parts
from opsd.build.assembly import assemble as assemble
