"""`python -m specrej_eval ...` is `specrej-eval ...`."""

import sys

from specrej_eval.cli import main

if __name__ == "__main__":
    sys.exit(main())
