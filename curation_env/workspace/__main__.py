"""`python -m curation` is the command `curation`."""

import sys

from .cli import main

sys.exit(main())
