"""`python -m fastdiff.cli`, and what torchrun starts."""

import sys

from fastdiff.cli import main

sys.exit(main())
