"""Other people's ways to decode a model larger than memory, one process each: llama.cpp on a mapped GGUF file, AirLLM, memopro.

    PEERS/bin/python -m evaluation.benchmarks.peer_engines REQUEST.json RESULT.json        (budget.py calls it)

Runs in an interpreter that has the peers installed and needs nothing else (docs/peers.md). A peer that is not there is one sentence.
Each gets the whole budget, memopro a share of it, and its own defaults otherwise; what is timed is what budget_engines.py times.
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

from cats.cli.command import exit_with_sentence
from cats.errors import CatsError
from evaluation.benchmarks.timed_run import Engine, Request, Step, answer

MEMOPRO_SHARE = 0.85
"""Of the budget, that it is told to keep: told all of it, it was killed at the limit."""
GGUF_NUMBERS = {"0": "float32", "1": "float16", "32": "bfloat16"}
"""Kinds of GGUF file, `general.file_type`, by the dtype of their matrices."""


def peer(module: str, package: str) -> ModuleType:
    """A peer's module, or one sentence where it cannot be had."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # the last two where a shared library does not fit this machine
        missing = isinstance(error, ImportError) and (error.name or "").split(".")[0] == module.split(".")[0]
        why = "is not installed in the interpreter of the peers" if missing else f"cannot be imported: {error}"
        raise CatsError(f"{package} {why}; give one that has it with --peer-python, docs/peers.md says how.") from error


def copy_of(request: Request, flag: str, what: str) -> str:
    """Where the peer's own copy of the weights lies."""
    if request.converted is None:
        raise CatsError(f"{flag} is missing: {what} (docs/peers.md).")
    return request.converted


def versioned(package: str) -> dict[str, str]:
    """The note that says which release of a peer ran."""
    return {"version": f"{package} {importlib.metadata.version(package)}"}


def llama_cpp(request: Request) -> Engine:
    """llama.cpp on a file mapped into memory: the kernel fetches and evicts its pages."""
    binding = peer("llama_cpp", "llama-cpp-python")
    path = copy_of(request, "--gguf-path", "llama.cpp reads a GGUF file of the same weights")
    positions = request.positions or request.prompt_tokens + request.tokens + 2
    threads = {"n_threads": request.threads, "n_threads_batch": request.threads}
    model = binding.Llama(path, n_ctx=positions, use_mmap=True, use_mlock=False, n_gpu_layers=0, verbose=False, **threads)

    def steps(prompt: Sequence[int]) -> Iterator[Step]:
        for token in model.generate(list(prompt), temp=0.0, repeat_penalty=1.0):
            yield Step([int(token)])

    kind = model.metadata.get("general.file_type", "")
    return Engine(steps, {"arithmetic": GGUF_NUMBERS.get(kind, f"kind {kind}"), **versioned("llama-cpp-python")})


def airllm(request: Request) -> Engine:
    """AirLLM: one file a layer, each mapped when its turn comes and dropped behind it, the next one on a thread of its own."""
    library = peer("airllm", "airllm")
    layers = copy_of(request, "--airllm-path", "AirLLM keeps a copy of the weights in one file a layer")
    from evaluation.benchmarks.greedy_loop import greedy_loop

    model = library.AutoModel.from_pretrained(request.model, device="cpu", layer_shards_saving_path=layers)
    return greedy_loop(model.model, request, versioned("airllm"))


def memopro(request: Request) -> Engine:
    """memopro: the checkpoint's own files through a runtime that holds what fits and evicts what is used last."""
    runtime = peer("memopro.rt", "memopro")
    streaming = peer("memopro.rt.torch", "memopro")
    from evaluation.benchmarks.greedy_loop import greedy_loop

    limits = {} if request.budget_bytes is None else dict.fromkeys(("budget", "process_budget"), int(MEMOPRO_SHARE * request.budget_bytes))
    model = streaming.stream_model(request.model, runtime=runtime.Runtime(**limits), device="cpu")
    return greedy_loop(model, request, versioned("memopro"))


PEERS: dict[str, Callable[[Request], Engine]] = {"llama_cpp": llama_cpp, "airllm": airllm, "memopro": memopro}


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Run what the first file asks for, write the second."""
    answer(sys.argv[1:] if argv is None else argv, PEERS)


if __name__ == "__main__":
    main()
