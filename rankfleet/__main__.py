"""`python -m rankfleet` is `rankfleet`."""

import sys

from .cli import main

sys.exit(main())
