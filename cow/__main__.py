"""`python -m cow` is the command `cow`."""

import sys

from cow.cli.main import main

sys.exit(main())
