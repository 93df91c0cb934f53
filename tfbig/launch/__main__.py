"""`python -m tfbig.launch`."""

import sys

from tfbig.launch import main

sys.exit(main())
