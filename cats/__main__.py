"""`python -m cats "prompt"`: see `cats/cli/ask.py`."""

from cats.cli.ask import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
