"""Build a datastore for the method REST from any text: ShareGPT conversations (.json, .json.gz) or plain text (any other name).

    python -m training.build_datastore --model-path MODEL --data-path sharegpt.json.gz notes.txt --output notes.datastore

Conversations are written in the model's chat template, so that answers are found behind the same tokens as when the model is asked. The
file takes 8 bytes a token and belongs to the tokenizer; building takes about 50 bytes of memory a token. It appears when it is complete.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import heartbeat, live_bar
from cats.datastore import Datastore
from cats.errors import CatsError
from cats.text import ModelText
from training.base_model import model_path_of
from training.chat_tokens import encode_chats, training_text
from training.conversations import read_sharegpt

CHATS = (".json", ".json.gz")
PIECE = 1 << 16
"""Characters of plain text that are tokenized at once, at least; pieces end where lines do."""
BATCH = 256
LONGEST = 2**31 - 1


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", help="checkpoint whose tokenizer is used; default: the environment variable CATS_BASE_MODEL")
    parser.add_argument("--data-path", type=Path, nargs="+", required=True, metavar="FILE", help="conversations or plain text")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the datastore")
    parser.add_argument("--template", help="chat template by name, or a .jinja file; default: the model's own")
    return parser.parse_args(argv)


def documents_of(path: Path, text: ModelText, model_path: Path, template: str | None) -> Iterator[np.ndarray]:
    """Token ids (int32) of each conversation of a file, or of all of a plain text."""
    if path.name.endswith(CHATS):
        chats = encode_chats(training_text(model_path, template), read_sharegpt(path), LONGEST)
        yield from (chat.ids_N for chat in chats)
    else:
        yield plain_ids(path, text)


def plain_ids(path: Path, text: ModelText) -> np.ndarray:
    """Token ids (int32) of a plain text, which is tokenized in pieces that end with a line."""
    try:
        with path.open(encoding="utf-8") as file:
            pieces = list(pieces_of(file))
    except (OSError, UnicodeDecodeError) as error:
        raise CatsError(f"cannot read {path}: {error}; give plain text in UTF-8, or conversations as .json or .json.gz.") from error
    tokens: list[int] = []
    for start in live_bar(range(0, len(pieces), BATCH), desc="tokenize", unit="batch", leave=False):
        encoded = text.tokenizer(pieces[start : start + BATCH], add_special_tokens=False, verbose=False)["input_ids"]
        tokens.extend(token for ids in encoded for token in ids)
    return np.array(tokens, dtype=np.int32)


def pieces_of(lines: "Iterator[str]") -> Iterator[str]:
    """Lines joined to pieces of at least `PIECE` characters."""
    pending, size = [], 0
    for line in lines:
        pending.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(pending)
            pending, size = [], 0
    if pending:
        yield "".join(pending)


def build(files: Sequence[Path], model_path: Path, template: str | None) -> Datastore:
    """Of these files, in the ids of the model's tokenizer."""
    chats = any(path.name.endswith(CHATS) for path in files)
    if template is not None and not chats:
        raise CatsError("--template writes conversations, and plain text has none; leave it out.")
    text = training_text(model_path, template) if chats else ModelText.from_pretrained(model_path)
    about = {
        "tokenizer": text.fingerprint,
        "vocabulary": max(text.tokenizer.get_vocab().values()) + 1,
        "sources": [path.name for path in files],
    }
    documents = [ids for path in files for ids in documents_of(path, text, model_path, template)]
    with heartbeat("sorting") as bar:
        return Datastore.build(documents, about, bar.set_description_str)


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    arguments = arguments_of(argv)
    if arguments.output.is_dir():
        raise CatsError(f"{arguments.output} is a directory; give --output the name of a file.")
    store = build(arguments.data_path, model_path_of(arguments.model_path), arguments.template)
    with heartbeat("writing"):
        store.save(arguments.output)
    documents = store.about["documents"]
    sys.stdout.write(
        f"{arguments.output}: {len(store.suffixes_M):,} tokens of {documents:,} {'text' if documents == 1 else 'texts'}, "
        f"{store.nbytes / 1e6:,.1f} MB on the disk and, in use, in memory\n"
    )


if __name__ == "__main__":
    main()
