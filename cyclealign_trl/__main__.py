"""Run `python -m cyclealign_trl` as the `cyclealign` command. Without arguments, it runs the demo."""

import sys

from .cli import main

if __name__ == "__main__":
    main(sys.argv[1:] or ["demo"])
