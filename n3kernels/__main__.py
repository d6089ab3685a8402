"""``python -m n3kernels`` is ``n3kernels``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
