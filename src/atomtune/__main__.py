"""`python -m atomtune` is the same as `atomtune`."""

import sys

from atomtune.cli import main

sys.exit(main())
