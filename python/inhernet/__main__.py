"""`python -m inhernet`."""

import sys

from inhernet.cli import main

if __name__ == "__main__":
    sys.exit(main())
