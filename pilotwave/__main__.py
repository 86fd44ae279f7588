"""`python -m pilotwave`."""

import sys

from pilotwave.cli import main

sys.exit(main())
