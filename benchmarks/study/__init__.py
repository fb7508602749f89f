"""The study: methods side by side on a real chat model and real dialogues."""
