"""`python -m cats "prompt"`, and the commands that have a word of their own: `python -m cats chat`, `python -m cats serve`."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {"chat": "cats.cli.chat", "serve": "cats.cli.serve"}
ASK = "cats.cli.ask"


def main(argv: Sequence[str] | None = None) -> None:
    """The command that the first word names; any other first word is asked (`-- chat` asks "chat")."""
    words = list(sys.argv[1:] if argv is None else argv)
    module = COMMANDS.get(words[0]) if words else None
    importlib.import_module(module or ASK).main(words[1:] if module else words)


if __name__ == "__main__":
    main()
