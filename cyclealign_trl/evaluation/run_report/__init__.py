"""One HTML page about runs."""

MAX_PROMPTS = 5000
"""Default number of prompts in a page. Their interactions take 10 to 40 MB, depending on the texts."""
