"""`python -m cats.cli.fetch`: bring SmolLM2-135M-Instruct, a small real chat model, into the cache, once; print where it lies."""

import sys
from collections.abc import Sequence

from cats import smollm2
from cats.cli.command import CommandParser, exit_with_sentence


def fetch_with_progress() -> str:
    """The model's directory, as text; a bar on standard error while it is being made."""
    if (directory := smollm2.cached()) is not None:
        return str(directory)
    from cats.cli.progress import live_bar

    about = f"SmolLM2-135M-Instruct (93 MB, once; kept in {smollm2.cache_directory()})"
    layout = "{desc}{percentage:3.0f}% |{bar}| {elapsed}"
    with live_bar(total=1.0, desc=f"fetching {about}", bar_format=layout, mininterval=0.5, leave=False) as bar:

        def report(what: str, share: float) -> None:
            bar.set_description(f"{what} {about}", refresh=False)
            bar.update(share - bar.n)

        return str(smollm2.fetch(report))


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="python -m cats.cli.fetch", description=__doc__)
    parser.parse_args(argv)
    sys.stdout.write(f"{fetch_with_progress()}\n")


if __name__ == "__main__":
    main()
