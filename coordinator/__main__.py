"""`python -m rankfleet.coordinator` is `coordinator`."""

import sys

from .cli import main

sys.exit(main())
