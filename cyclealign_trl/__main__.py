"""`python -m cyclealign_trl`: the `cyclealign` command, which shows the demo unless told otherwise."""

import sys

from .cli import COMMANDS, main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(arguments if arguments[:1] and arguments[0] in COMMANDS else ["demo", *arguments])
