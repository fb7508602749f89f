"""`python -m cyclealign_trl`: the `cyclealign` command, which shows the demo unless told otherwise."""

import sys

from .cli import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(arguments or ["demo"])
