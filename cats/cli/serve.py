"""`python -m cats serve`: a model behind OpenAI's protocol, and a page to try it on, until SIGTERM or Ctrl-C (docs/serve.md)."""

import argparse
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from ipaddress import ip_address
from types import FrameType
from typing import TYPE_CHECKING

from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.default_model import MODEL
from cats.cli.model_flags import add_model_flags, load_model
from cats.config import GenerationConfig, require
from cats.errors import CatsError

if TYPE_CHECKING:
    from cats.serve.app import Settings
    from cats.serve.desk import Desk

KEY_VARIABLE = "CATS_API_KEY"
MOST_CONNECTIONS = 512


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m cats serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, for this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one (default: %(default)s)")
    parser.add_argument(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE),
        help=f"that requests must bring (default: ${KEY_VARIABLE}, which ps does not show)",
    )
    parser.add_argument("--model-name", help="that requests must give (default: the checkpoint's)")
    parser.add_argument("--queue", type=int, default=8, help="requests that may wait for their turn (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="of an answer whose request does not say (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="where a request gives none (default: %(default)s)")
    add_model_flags(parser)
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> None:
    """Raise `CatsError` for what cannot be, before anything is loaded."""
    for package in ("starlette", "uvicorn"):
        require(find_spec(package) is not None, f"serving needs {package}, which is not installed; pip install 'cats-speculation[serve]'.")
    GenerationConfig(arguments.max_new_tokens, arguments.temperature)
    key = arguments.api_key
    require(0 <= arguments.port <= 65535, f"--port is {arguments.port}; it must lie between 0 and 65535.")
    require(arguments.queue >= 0, f"--queue is {arguments.queue}; it must be 0 or above.")
    visible = key is None or (key.isascii() and key.isprintable() and key.split() == [key])
    require(visible, f"the key of --api-key or ${KEY_VARIABLE} must be one word of ASCII characters.")


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address, which takes no connections yet; `CatsError` where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        place = socket.socket(family, kind, protocol)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except OSError as error:
        raise CatsError(f"cannot listen at {host}, port {port}: {error.strerror}; give another --host or --port.") from error
    return place


def is_for_this_machine_alone(place: socket.socket) -> bool:
    """Whether no other machine can reach a server at this address."""
    return ip_address(place.getsockname()[0]).is_loopback


def run_server(desk: "Desk", settings: "Settings", place: socket.socket) -> None:
    """Serve until a signal comes and the answer in hand is finished; a second Ctrl-C gives that up."""
    import uvicorn

    from cats.serve.app import build_app

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            desk.closing = True
            super().handle_exit(sig, frame)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = place.getsockname()[:2]
            print(f"{settings.name} at http://{f'[{host}]' if ':' in host else host}:{port} and /v1; Ctrl-C ends it", flush=True)

    config = uvicorn.Config(
        build_app(desk, settings),
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
    )
    Server(config).run([place])


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    check(arguments)
    with bound(arguments.host, arguments.port) as place:
        from cats.serve.app import Settings  # loaded before the model, so that a memory budget counts it
        from cats.serve.desk import Desk
        from cats.text import checkpoint_name

        alone = is_for_this_machine_alone(place)
        if not alone and arguments.api_key is None:
            sys.stderr.write(f"other machines can reach this server and use it; --api-key or ${KEY_VARIABLE} asks them for a key.\n")
        model, method = load_model(arguments)
        name = arguments.model_name or (checkpoint_name(arguments.model_path) if arguments.model_path else MODEL)
        settings = Settings(name, arguments.api_key, alone, arguments.temperature, arguments.max_new_tokens)
        run_server(Desk(model, method, arguments.queue), settings, place)


if __name__ == "__main__":
    main()
