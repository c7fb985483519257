"""Start the launcher as `python -m stillhouse`, for where its script is not on the path."""

import sys

from stillhouse.cli import main

if __name__ == "__main__":
    sys.exit(main())
