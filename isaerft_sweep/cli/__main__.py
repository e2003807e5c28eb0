"""``python -m isaerft_sweep.cli``."""

import sys

from isaerft_sweep.cli.parser import main

sys.exit(main())
