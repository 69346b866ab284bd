"""`python -m jaxft.verify DIR [--out FILE] [--long N]`."""

import sys

from jaxft.verify import main

if __name__ == "__main__":
    sys.exit(main())
