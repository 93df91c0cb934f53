"""`python -m tfbig.launch`."""

import sys

from tfbig.launch import main

if __name__ == "__main__":
    sys.exit(main())
