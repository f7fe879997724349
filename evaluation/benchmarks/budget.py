"""Tokens per second of one model under one memory budget: ours (plain, CATS, nested), transformers' ways and peers, in turns.

    python -m evaluation.benchmarks.budget --model-path M --draft-adapter-path D --shallow-adapter-path S --memory-budget 8GB \
        --replayed-acceptance 3.05 --repeats 3 --output evaluation/results/seven_billion.json
    ... --nested-model-path N --nested-steps 20 --nested-acceptance 11     and the chain of nested weights made of the same checkpoint
    ... --peer-python PEERS/bin/python --gguf-path F --airllm-path A       and llama.cpp, AirLLM, memopro (docs/peers.md)

Every run is a fresh process in a memory control group of the budget's size (which counts the page cache), on shards that the page
cache has forgotten. With --flash-bandwidth the kernel holds every engine's reads to that rate. With --replayed-acceptance the adapters
may be random, with --nested-acceptance the weights (see evaluation/replay.py); all figures so made carry "replayed acceptance". The
bound of a pass is what the wire needs for the bytes that the engine read, and memory for the weights that drafting multiplies by: both
rates are measured right behind each run, when nothing else runs. Finished runs lie in `<output>.runs.jsonl`: the same command goes on
where it stopped, and tries failed runs again.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cats.checkpoint import DTYPES, weight_files
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import live_bar
from cats.errors import CatsError
from cats.files import write_atomically
from cats.planning.plan import parse_amount
from cats.runtime.link import measure_read_rate, rate_text
from evaluation.benchmarks.budget_engines import ENGINES
from evaluation.benchmarks.peer_engines import PEERS
from evaluation.benchmarks.timed_run import Request
from evaluation.memory_run import forget, python_command, run_limited
from evaluation.record_file import append_record, check_settings, read_records, write_json
from evaluation.subject import files_fingerprint, weights_fingerprint
from evaluation.timing import environment

TITLES = {
    "plain": "ours, plain decoding",
    "cats": "ours, CATS",
    "nested": "ours, nested",
    "accelerate": "accelerate, disk offload",
    "mmap": "transformers, mapped files",
    "llama_cpp": "llama.cpp, mapped GGUF",
    "airllm": "AirLLM, layer by layer",
    "memopro": "memopro, streamed weights",
}
REFERENCE = "plain"
COLUMNS = (
    *("engine", "tokens/s, median (range)", "against our plain", "tokens/pass", "GB read/token", "peak GB", "group's peak GB"),
    *("arithmetic", "draft + shallow + target, s a pass", "of it waiting", "bound, s a pass", "times its bound"),
)
MEASURED_BYTES = 256 << 20
"""Of memory, read to find its rate; more than any cache holds."""
SOME_LIMIT = 2**62


def title(engine: str, replayed: dict[str, float | None]) -> str:
    """An engine's name in tables; the replayed acceptance of those that have one is part of it."""
    mean = replayed.get(engine)
    return TITLES[engine] if mean is None else f"{TITLES[engine]}, replayed acceptance {mean:g}"


def memory_rate(threads: int) -> float:
    """Bytes per second that so many threads read from memory, at best."""
    before, seconds = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    numbers = torch.ones(MEASURED_BYTES // 4)
    for _ in range(5):
        begin = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begin)
    torch.set_num_threads(before)
    return MEASURED_BYTES / min(seconds)


def bound_seconds(run: dict[str, Any]) -> float:
    """What a pass needs at least: the wire for what was read, and memory for the weights that drafting multiplies by."""
    front = run["notes"].get("front_bytes_per_pass", 0)
    return float(run["disk_bytes_per_step"] / run["wire_bytes_per_s"] + front / run["memory_bytes_per_s"])


def in_turns(engines: Sequence[str], repeats: int) -> list[tuple[int, str]]:
    """Every engine once a repeat, the order turning by one from repeat to repeat."""
    return [(repeat, engines[(repeat + place) % len(engines)]) for repeat in range(repeats) for place in range(len(engines))]


def files_of(converted: str | None) -> list[Path]:
    """The files of a peer's own copy of the weights, which may be missing."""
    path = Path(converted or "")
    return [path] if path.is_file() else sorted(file for file in path.rglob("*.safetensors") if converted)


def one_run(request: Request, python: str, read_rate: float | None, limited: bool, timeout: float) -> dict[str, Any]:
    """A fresh process of an interpreter for one request; what it measured, or why it failed."""
    shards = weight_files(request.model)
    forget([*shards, *files_of(request.converted)])
    module = "evaluation.benchmarks.peer_engines" if request.engine in PEERS else "evaluation.benchmarks.budget_engines"
    with tempfile.TemporaryDirectory(prefix="cats-budget-") as folder:
        asked, answer, log = (Path(folder) / name for name in ("request.json", "result.json", "log.txt"))
        asked.write_text(json.dumps(dataclasses.asdict(request)))
        outcome = run_limited(
            python_command(module, str(asked), str(answer), python=python),
            (request.budget_bytes or SOME_LIMIT) if limited else None,
            read_rate,
            shards[0],
            log,
            timeout,
        )
        result = json.loads(answer.read_text()) if answer.exists() else {"failed": outcome.failure or "it ended without a result"}
    disk = measure_read_rate(shards[0])
    rates = {"wire_bytes_per_s": disk if read_rate is None else min(disk, read_rate), "memory_bytes_per_s": memory_rate(request.threads)}
    return {**result, **rates, "group_peak_bytes": outcome.group_peak_bytes}


def summarise(records: Sequence[dict[str, Any]], engines: Sequence[str], replayed: dict[str, float | None]) -> list[dict[str, Any]]:
    """One row per engine: medians over its runs, and the median of the quotients of runs of the same repeat."""
    rows = []
    speeds = {(r["engine"], r["repeat"]): r["tokens_per_s"] for r in records if "failed" not in r}
    for engine in engines:
        own = [record for record in records if record["engine"] == engine]
        good = [record for record in own if "failed" not in record]
        row: dict[str, Any] = {"engine": title(engine, replayed), "runs": len(own), "failed": [r["failed"] for r in own if "failed" in r]}
        if good:
            rates = [record["tokens_per_s"] for record in good]
            names = ("tokens_per_s", "accepted_length", "disk_bytes_per_token", "load_seconds", "prefill_seconds", "seconds_per_step")
            row |= {name: statistics.median(record[name] for record in good) for name in names}
            row |= {"slowest": min(rates), "fastest": max(rates), **{k: good[0]["notes"].get(k) for k in ("arithmetic", "version")}}
            row |= {name: max(record[name] for record in good) for name in ("peak_bytes", "load_peak_bytes")}
            row["group_peak_bytes"] = max((record["group_peak_bytes"] for record in good if record["group_peak_bytes"]), default=None)
            bounds = [bound_seconds(record) for record in good]
            row["bound_seconds"] = statistics.median(bounds)
            above = [run["seconds_per_step"] / bound for run, bound in zip(good, bounds, strict=True) if bound]
            row["times_bound"] = statistics.median(above) if above else None
            row |= {name: statistics.median(record[name] for record in good) for name in ("wire_bytes_per_s", "memory_bytes_per_s")}
            pairs = [speeds[engine, r["repeat"]] / speeds[REFERENCE, r["repeat"]] for r in good if (REFERENCE, r["repeat"]) in speeds]
            row["against_plain"] = statistics.median(pairs) if pairs else None
            staged = [record["stage_seconds_per_step"] for record in good if record["stage_seconds_per_step"]]
            row["stage_seconds_per_step"] = medians(staged) if staged else None
        rows.append(row)
    return rows


def medians(staged: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median of every stage over the runs; a stage that a run does not know took it no time."""
    return {name: statistics.median(run.get(name, 0.0) for run in staged) for name in dict.fromkeys(name for run in staged for name in run)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        if "tokens_per_s" not in row:
            why = (row["failed"] or ["not run"])[0].removeprefix("error: ").partition(" (")[0]
            lines.append(f"| {row['engine']} | {why} |" + " - |" * (len(COLUMNS) - 2))
            continue
        stages = row["stage_seconds_per_step"]
        cells = [
            ", ".join(filter(None, (row["engine"], row["version"])))
            + (f" ({len(row['failed'])} of {row['runs']} failed)" if row["failed"] else ""),
            f"{row['tokens_per_s']:.3f} ({row['slowest']:.3f}-{row['fastest']:.3f})",
            "-" if row["against_plain"] is None else f"{row['against_plain']:.2f}x",
            f"{row['accepted_length']:.2f}",
            f"{row['disk_bytes_per_token'] / 1e9:.3f}",
            f"{row['peak_bytes'] / 1e9:.3f}",
            "-" if row["group_peak_bytes"] is None else f"{row['group_peak_bytes'] / 1e9:.3f}",
            row["arithmetic"],
            " + ".join(f"{stages.get(name, 0.0):.3f}" for name in ("draft", "shallow", "target"))
            if stages
            else f"{row['seconds_per_step']:.3f}",
            f"{stages['stream_wait']:.3f}" if stages else "-",
            f"{row['bound_seconds']:.3f}",
            "-" if row["times_bound"] is None else f"{row['times_bound']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rate_of(args: argparse.Namespace) -> float | None:
    """Bytes per second that the kernel lets every engine read; None: as the disk is."""
    if args.flash_bandwidth is None:
        return None
    if args.no_limit:
        raise CatsError("--flash-bandwidth holds all engines by a control group; leave out --no-limit, or the bandwidth.")
    return float(parse_amount(args.flash_bandwidth, "--flash-bandwidth"))


def report(args: argparse.Namespace, request: Request, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """The Markdown file."""
    budget = "no limit" if request.budget_bytes is None else f"{request.budget_bytes / 1e9:g} GB for the whole process"
    enforced = "enforced by a memory control group, page cache included" if not args.no_limit else "NOT enforced from outside (--no-limit)"
    rate = rate_of(args)
    flash = "the disk as it is" if rate is None else f"emulated {rate_text(rate)} for every engine, by the kernel"
    replay = "".join(
        f"\n{TITLES[engine][6:]} runs with replayed acceptance: {mean:g} tokens a pass"
        + (f" and {args.replayed_corrections:g} corrections a pass are taken" if engine == "cats" else " are taken")
        + " from a schedule, all work is done. It says nothing of what the draft would accept.\n"
        for engine, mean in replayed_means(args).items()
        if mean is not None and engine in args.engines
    )
    return (
        f"# {Path(request.model).resolve().name} under {budget}\n\n{enforced[0].upper()}{enforced[1:]}; {flash}; {args.repeats} runs of "
        f"each engine in turns, fresh processes, {request.tokens} tokens or more behind a prompt of {request.prompt_tokens} and a warm-up "
        f"step; {request.threads} thread(s), {about['cpu']}. Peak: resident memory of the process, mapped files included; the group's: "
        "the kernel's figure, from outside. Bound: bytes read at the wire's rate, and what drafting multiplies by at memory's, both "
        "measured.\n"
        f"{replay}\n{table(rows)}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m evaluation.benchmarks.budget", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model-path", required=True, help="checkpoint directory with safetensors")
    parser.add_argument("--draft-adapter-path", help="for CATS")
    parser.add_argument("--shallow-adapter-path", help="for CATS")
    parser.add_argument("--nested-model-path", help="nested checkpoint made of the same weights, for nested")
    parser.add_argument("--peer-python", metavar="PYTHON", help="interpreter that has the peers installed (docs/peers.md)")
    parser.add_argument("--gguf-path", metavar="FILE", help="the same weights for llama.cpp, by evaluation.benchmarks.write_gguf")
    parser.add_argument("--airllm-path", metavar="DIR", help="where AirLLM keeps the same weights layer by layer; made where it is missing")
    which = "default: all; nested where --nested-model-path is given, peers where --peer-python is"
    parser.add_argument("--engines", nargs="+", choices=(*ENGINES, *PEERS), help=which)
    parser.add_argument("--memory-budget", required=True, help="of the whole process, like 8GB")
    parser.add_argument("--flash-bandwidth", help="emulate a slower flash, like 2GB/s (default: the disk as it is)")
    parser.add_argument("--no-limit", action="store_true", help="do not enforce the budget from outside (control groups need root)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each engine (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that one run may take (default: %(default)s)")
    parser.add_argument("--dtype", choices=(*DTYPES, "auto"), default="auto", help="of our weights in memory (default: as stored)")
    arithmetic = "of our arithmetic and caches (default: float32)"
    parser.add_argument("--compute-dtype", choices=(*DTYPES, "auto"), default="auto", help=arithmetic)
    parser.add_argument("--positions", type=int, help="that our caches are made for (default: what a run needs)")
    parser.add_argument("--replayed-acceptance", type=float, metavar="A", help="tokens a pass of CATS by schedule; for random adapters")
    parser.add_argument("--nested-acceptance", type=float, metavar="A", help="tokens a pass of nested by schedule; for random weights")
    parser.add_argument(
        "--replayed-corrections",
        type=float,
        default=2.6,
        metavar="C",
        help="corrections a pass with it (default: %(default)s, what adapters of a small model had)",
    )
    for name, default, text in (
        ("tokens", 8, "timed tokens of a run, at least"),
        ("prompt-tokens", 32, "length of the random prompt"),
        ("threads", 1, "CPU threads"),
        ("ring-buffers", 3, "size of our ring in largest matrices"),
        ("steps", 5, "drafted tokens of CATS"),
        ("nested-steps", 20, "drafted tokens of nested"),
        ("tree-topk", 1, "candidates per drafted token; 1 is a chain"),
        ("total-tokens", -1, "nodes of the tree, -1 automatic"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="result file (.json); a .md table lies beside it")
    args = parser.parse_args(argv)
    usual = [engine for engine in ENGINES if engine != "nested" or args.nested_model_path is not None]
    args.engines = args.engines or [*usual, *(PEERS if args.peer_python else ())]
    return args


def replayed_means(args: argparse.Namespace) -> dict[str, float | None]:
    """Tokens a pass that a schedule decides, by engine."""
    return {"cats": args.replayed_acceptance, "nested": args.nested_acceptance}


def check_flags(args: argparse.Namespace) -> None:
    """Refuse counts below 1 and missing adapters before anything runs."""
    for name in ("repeats", "tokens", "prompt_tokens", "threads", "ring_buffers", "steps", "nested_steps", "tree_topk"):
        if getattr(args, name) < 1:
            raise CatsError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    if "cats" in args.engines and None in (args.draft_adapter_path, args.shallow_adapter_path):
        raise CatsError("CATS needs --draft-adapter-path and --shallow-adapter-path; give them, or choose --engines without cats.")
    if args.peer_python is not None and shutil.which(args.peer_python) is None:
        raise CatsError(f"--peer-python is {args.peer_python}, which is no program; give the interpreter of the peers' environment.")
    given = args.nested_model_path is not None
    if ("nested" in args.engines) != given:
        raise CatsError("the engine nested and --nested-model-path belong together; give both or neither.")
    if args.nested_acceptance is not None and not given:
        raise CatsError("--nested-acceptance is about the engine nested; give --nested-model-path with it.")


def request_of(args: argparse.Namespace, engine: str) -> Request:
    """The run of one engine."""
    adapters, nested = (args.draft_adapter_path, args.shallow_adapter_path), engine == "nested"
    names = ("dtype", "compute_dtype", "tokens", "prompt_tokens", "positions", "threads", "ring_buffers", "tree_topk", "total_tokens")
    return Request(
        engine=engine,
        model=args.nested_model_path if nested else args.model_path,
        adapters=None if nested or None in adapters else adapters,
        budget_bytes=parse_amount(args.memory_budget, "--memory-budget"),
        **{name: getattr(args, name) for name in names},
        steps=args.nested_steps if nested else args.steps,
        replayed_acceptance=replayed_means(args).get(engine),
        replayed_corrections=args.replayed_corrections,
        converted={"llama_cpp": args.gguf_path, "airllm": args.airllm_path}.get(engine),
    )


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides a figure; a resumed run must have the same."""
    request = request_of(args, "cats")
    settings = {
        **dataclasses.asdict(request),
        "model": weights_fingerprint(args.model_path),
        "limited": not args.no_limit,
        "adapters": [weights_fingerprint(path) for path in request.adapters or ()],
        "read_rate": rate_of(args),
        "rates": "measured behind each run",
    }
    del settings["engine"]
    if args.nested_model_path is not None:
        nested = {"model": weights_fingerprint(args.nested_model_path), "steps": args.nested_steps}
        settings["nested"] = nested | {"replayed_acceptance": args.nested_acceptance}
    if args.gguf_path is not None:
        settings["gguf"] = files_fingerprint(files_of(args.gguf_path))
    return settings


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Fill in what is missing, write the table."""
    args = parse(argv)
    check_flags(args)
    request, rate, replayed = request_of(args, REFERENCE), rate_of(args), replayed_means(args)
    runs, settings_file = args.output.with_suffix(".runs.jsonl"), args.output.with_suffix(".settings.json")
    settings = settings_of(args)
    check_settings(settings_file, settings, runs)
    write_json(settings_file, {"settings": settings})
    done = {(record["repeat"], record["engine"]) for record in read_records(runs) if "failed" not in record}
    for repeat, engine in live_bar([turn for turn in in_turns(args.engines, args.repeats) if turn not in done], desc="runs"):
        python = (args.peer_python if engine in PEERS else None) or sys.executable
        measured = one_run(request_of(args, engine), python, rate, not args.no_limit, args.timeout)
        append_record(runs, {"engine": engine, "repeat": repeat, "label": title(engine, replayed), **measured})
    latest = {(record["repeat"], record["engine"]): record for record in read_records(runs)}
    records = [record for (repeat, _), record in sorted(latest.items()) if repeat < args.repeats]
    rows, about = summarise(records, args.engines, replayed), environment()
    write_json(args.output, {"rows": rows, "settings": settings, "environment": about})
    text = report(args, request, rows, about)
    write_atomically(args.output.with_suffix(".md"), lambda part: part.write_text(text, encoding="utf-8"))
    print(text)


if __name__ == "__main__":
    main()
