"""`python -m nsjail_py` is the command `nsjail-py`."""

import sys

from .cli import main

sys.exit(main())
