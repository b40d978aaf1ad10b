"""What differs between operating systems, chosen once."""

import sys

if sys.platform == "win32":
    from .platform_win32 import available_mb, die_with_parent, low_priority, peak_rss_mb, slot
else:
    from .platform_posix import available_mb, die_with_parent, low_priority, peak_rss_mb, slot

__all__ = ["available_mb", "die_with_parent", "low_priority", "peak_rss_mb", "slot"]
