"""Everything a run is made of, loaded and checked before anything is written."""

from opsd.build.assembly import Parts as Parts
from opsd.build.assembly import assemble as assemble
