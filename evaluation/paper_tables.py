"""The paper's tables with our figures beside its own, made of result files (quantities.py). Measures nothing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from cats.planning.plan import amount
from evaluation import quality_curve
from evaluation.acceptance_report import PLAIN, TITLES, with_interval
from evaluation.cycles import Place
from evaluation.metrics import ModelShape, paper_bytes_per_token
from evaluation.presets import title_of
from evaluation.published import layer_units, paper_rows, recomputed_gb
from evaluation.quantities import CYCLE_BENCH, Exits, Results, Run, variant
from evaluation.questions import BENCHES
from evaluation.sheets import Sheet, number

PAPER_METHODS = {
    "REST": "rest",
    "Lookahead": "lookahead",
    "Kangaroo": "kangaroo",
    "Medusa": "medusa",
    "EAGLE-self chain": "eagle_self_chain",
    "CATS chain": "cascade_chain",
    "EAGLE-self tree": "eagle_self_tree",
    "CATS tree": "cascade_tree",
}
"""Presets by the names of published.json."""
DRAFTING_STEPS = (3, 5, 7, 10)
STEPPED = {"Kangaroo": "kangaroo", "EAGLE-self chain": "eagle_self_chain", "CATS chain": "cascade_chain"}
TREE_VARIANTS = (
    "cascade_chain",
    "cascade_chain:verifier=none",
    "cascade_tree",
    "cascade_tree:verifier=corrections",
    "cascade_tree:verifier=siblings",
    "cascade_tree:verifier=none",
    "cascade_tree_60_nodes",
    "cascade_tree_two_rounds",
)
Row = Mapping[str, Any] | None


def of(row: Row, *names: str) -> Any:
    """A value inside nested dictionaries; None where something on the way is missing."""
    for name in names:
        row = row.get(name) if row is not None else None
    return row


def preset_of(label: str) -> str:
    """The preset's name of a label."""
    return label.partition(":")[0]


def beside(own: str, paper: float | None, form: str = ".2f") -> str:
    """Our figure, and the paper's in brackets where it has one."""
    return own if paper is None else f"{own} ({paper:{form}})"


def bounds(value: float | None, interval: Sequence[float] | None, form: str = ".2f") -> str:
    """A figure and its interval."""
    if value is None:
        return "-"
    return f"{value:{form}}" + ("" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]")


def headline(run: Run) -> list[Place]:
    """The largest budget on every wire."""
    return [Place(run.budgets[-1], wire.rate, not run.args.no_pinning) for wire in run.wires]


def setting(results: Results) -> str:
    """What the tables of accepted lengths say of how they were made."""
    work, name = results.run.work, results.paper_model
    return (
        f"{results.run.name}, greedy, {work.questions} questions a set, at most {work.tokens} tokens a turn; ± is half of the 90 % "
        f"interval by bootstrap over questions. In brackets the paper's, {name}."
    )


def table1(results: Results) -> list[Sheet]:
    """Accepted length and speed-up of every method: greedy, relaxed, and the order of methods against the paper's."""
    return [lengths(results), speeds(results), speeds_by_set(results), relaxed(results), *orders(results)]


def paper_of(results: Results, decoding: str = "greedy") -> dict[str, dict[str, Any]]:
    """The paper's rows by preset."""
    return {PAPER_METHODS[row["method"]]: row for row in paper_rows(results.paper, results.paper_model, decoding)}


def lengths(results: Results) -> Sheet:
    """Accepted length by set."""
    paper, lines = paper_of(results), []
    for label in results.run.methods:
        row, theirs = results.row(label), paper.get(preset_of(label))
        per_bench = [
            beside(
                with_interval(of(row, "accepted_length", bench), of(row, "accepted_length_interval", bench)),
                of(theirs, "accepted_length", bench),
            )
            for bench in BENCHES
        ]
        whole = row is not None and len(row["accepted_length"]) == len(BENCHES)
        mean = with_interval(of(row, "mean"), of(row, "mean_interval")) if whole else "-"
        same = "-" if row is None else f"{row['identical_to_plain']} of {row['compared_to_plain']}"
        repeated = number(of(row, "repeated_4gram_share"), ".0%")
        lines.append([title_of(label), of(row, "exits") or "-", *per_bench, beside(mean, of(theirs, "mean")), same, repeated])
    head = ["method", "exits", *(TITLES[bench] for bench in BENCHES), "mean", "same text as plain", "repeated 4-grams"]
    return Sheet("Accepted length", head, lines, setting(results))


def speeds(results: Results) -> Sheet:
    """Speed-up over plain decoding, as measured in turns, by wire."""
    run, paper = results.run, paper_of(results)
    places, lines = headline(run), []
    for label in run.methods:
        cells = [results.cell(place, label) for place in places]
        ups = [bounds(of(cell, "figures", "speed_up"), of(cell, "figures", "speed_up_interval")) for cell in cells]
        rates = [number(of(cell, "figures", "tokens_per_second")) for cell in cells]
        theirs = number(of(paper.get(preset_of(label)), "speed_up", CYCLE_BENCH))
        lines.append([title_of(label), *ups, *rates, theirs])
    head = ["method", *(f"speed-up, {place.wire}" for place in places), *(f"tokens/s, {place.wire}" for place in places), "paper, Orin"]
    turns = ", ".join(f"{wire.turns} on {place.wire}" for wire, place in zip(run.wires, places, strict=True))
    note = (
        f"{amount(run.budgets[-1])} of weights in memory, each method with its best plan; MT-bench questions in turns ({turns}), at most "
        f"{run.work.turn_tokens} tokens, prompts left out, {run.args.threads} thread(s). In brackets 90 % intervals, by bootstrap over "
        "questions."
    )
    return Sheet("Speed-up over plain decoding on MT-bench", head, lines, note)


def speeds_by_set(results: Results) -> Sheet:
    """Speed-up by set: accepted length there over the time of a cycle as it was measured in turns."""
    place, paper, lines = headline(results.run)[-1], paper_of(results), []
    plain = of(results.cell(place, PLAIN), "figures", "cycle_seconds")
    for label in results.run.methods:
        row, cycle = results.row(label), of(results.cell(place, label), "figures", "cycle_seconds")
        theirs = paper.get(preset_of(label))
        known = None not in (plain, cycle) and row is not None
        accepted = [row["accepted_length"].get(bench) if known and row is not None else None for bench in BENCHES]
        ups = [
            beside(number(None if length is None else length * plain / cycle), of(theirs, "speed_up", bench))
            for length, bench in zip(accepted, BENCHES, strict=True)
        ]
        lines.append([title_of(label), number(cycle, ".4f"), *ups])
    head = ["method", "cycle, s", *(TITLES[bench] for bench in BENCHES)]
    note = (
        f"{place.label}. Not measured on each set: accepted length there, times plain decoding's cycle over the method's. "
        "In brackets the paper's."
    )
    return Sheet("Speed-up by set", head, lines, note)


def relaxed(results: Results) -> Sheet:
    """Accepted length by typical acceptance, on MT-bench, from the points of figure 5."""
    paper, lines = paper_of(results, "relaxed"), []
    for point in (results.quality or {"points": []})["points"]:
        if not point["lossless"] and point["rule"].startswith("typical 0.09:0.3,"):
            own = with_interval(point["accepted_length"], point["accepted_length_interval"])
            lines.append(
                [title_of(point["method"]), beside(own, of(paper.get(preset_of(point["method"])), "accepted_length", CYCLE_BENCH))]
            )
    note = f"MT-bench, {results.run.work.quality_questions} first turns, tau 0.09, alpha 0.3. The other sets were not run relaxed."
    return Sheet("Relaxed: typical acceptance at temperature 0.7", ["method", "accepted length"], lines, note)


def orders(results: Results) -> Iterator[Sheet]:
    """The order of methods by mean accepted length, ours and the paper's, and every pair that stands the other way round."""
    paper = {preset: row["mean"] for preset, row in paper_of(results).items()}
    own = {preset_of(row["method"]): row for label in results.run.methods if (row := results.row(label)) is not None}
    common = [preset for preset in paper if preset in own]
    ours, theirs = (
        sorted(common, key=lambda preset: -means[preset]) for means in ({name: row["mean"] for name, row in own.items()}, paper)
    )
    lines = [[str(place + 1), title_of(mine), title_of(other)] for place, (mine, other) in enumerate(zip(ours, theirs, strict=True))]
    yield Sheet("Order by mean accepted length", ["place", "here", "paper"], lines)
    turned = [(first, second) for first, second in combinations(theirs, 2) if own[first]["mean"] < own[second]["mean"]]
    inversions = []
    for first, second in turned:
        apart = own[first]["mean_interval"][1] < own[second]["mean_interval"][0]
        figures = [with_interval(own[name]["mean"], own[name]["mean_interval"]) for name in (first, second)]
        inversions.append(
            [title_of(first), title_of(second), f"{paper[first]:.2f} > {paper[second]:.2f}", " < ".join(figures), "yes" if apart else "no"]
        )
    note = "" if inversions else "No pair of methods stands the other way round."
    head = ["method", "behind, here", "paper", "here", "intervals apart"]
    yield Sheet("Inversions", head, inversions, note)


def table2(results: Results) -> list[Sheet]:
    """The paper's table of larger models, and ours where one was given."""
    models = [
        model for model in ("vicuna-13b", "llama2-7b", "llama2-13b") if results.run.args.model_path is None or model == results.paper_model
    ]
    own = [lengths(results), speeds(results)] if results.run.args.model_path is not None else []
    return [*own, *(paper_sheet(results, model, how) for model in models for how in ("greedy", "relaxed"))]


def paper_sheet(results: Results, model: str, decoding: str) -> Sheet:
    """What the paper prints of a model."""
    lines = []
    for row in paper_rows(results.paper, model, decoding):
        pairs = [f"{row['accepted_length'][bench]:.2f}, {row['speed_up'][bench]:.2f} x" for bench in BENCHES]
        lines.append([row["method"], *pairs, f"{row['mean']:.2f}, {row['mean_speed_up']:.2f} x"])
    return Sheet(
        f"The paper's {model}, {decoding}: accepted length, speed-up", ["method", *(TITLES[bench] for bench in BENCHES), "mean"], lines
    )


def speed_cells(results: Results, place: Place, label: str, exits: Exits | None) -> list[str]:
    """Accepted length on MT-bench, seconds of arithmetic a token, tokens/s by these, and what was measured in turns."""
    row, cell = results.row(label, exits), results.cell(place, label, exits)
    length, seconds = of(row, "accepted_length", CYCLE_BENCH), of(cell, "figures", "cycle_seconds")
    stages = of(cell, "figures", "stage_seconds_per_cycle") or {}
    known = None not in (length, seconds)
    return [
        with_interval(length, of(row, "accepted_length_interval", CYCLE_BENCH)),
        number((stages.get("total", 0.0) - stages.get("stream_wait", 0.0)) / length if known else None, ".4f"),
        number(length / seconds if known else None, ".3f"),
        bounds(of(cell, "figures", "tokens_per_second"), of(cell, "figures", "tokens_per_second_interval"), ".3f"),
        bounds(of(cell, "figures", "speed_up"), of(cell, "figures", "speed_up_interval")),
    ]


SPEED_HEAD = ("accepted length", "compute s/token", "tokens/s", "in turns", "speed-up in turns")
SPEED_NOTE = (
    "Accepted length: MT-bench, all weights in memory. tokens/s: that length over the time of a cycle. In turns: tokens/s and speed-up "
    "over plain decoding as measured on the same questions, with 90 % intervals."
)


def table3(results: Results) -> list[Sheet]:
    """Speed by memory budget; CATS with the deepest shallow exit that a budget holds."""
    run, lines = results.run, []
    printed = {(row["budget_gb"], row["method"]): row for row in results.paper["memory_budget"]["rows"]}
    for budget, paper_budget in zip(run.budgets, paper_budgets(run), strict=True):
        place = Place(budget, run.wires[-1].rate, not run.args.no_pinning)
        deepest = run.deepest[budget]
        for name, label, exits in (("Baseline", PLAIN, None), ("Kangaroo", "kangaroo", None), ("CATS", "cascade_chain", deepest)):
            theirs = printed.get((paper_budget, name))
            says = "-" if theirs is None else f"{theirs['accepted_length']:.2f}, {theirs['tokens_per_s']:.3f}"
            fitting = run.can(label) and (name != "CATS" or deepest is not None)
            cell = results.cell(place, label, exits) if fitting else None
            refused = not fitting or (cell is not None and "refused" in cell)
            figures = ["does not fit", *[""] * (len(SPEED_HEAD) - 1)] if refused else speed_cells(results, place, label, exits)
            at = at_exits(results.row(label, exits)) if fitting else ""
            lines.append([amount(budget), name + at, *figures, says])
    head = ("budget of weights", "method", *SPEED_HEAD, "paper: accepted, tokens/s")
    pinned = "the paper's way, nothing pinned" if run.args.no_pinning else "what the budget has room for is pinned, for plain decoding too"
    wire, where = Place(0, run.wires[-1].rate).wire, results.paper["memory_budget"]["where"]
    note = f"{run.name}, {wire}, {run.args.threads} thread(s); {pinned}. {SPEED_NOTE} The paper: {where}."
    return [Sheet("Table 3: speed by memory budget", head, lines, note)]


def at_exits(row: Row) -> str:
    """Behind the method's name, the exits of its adapters."""
    return f", exit {row['exits']}" if row is not None and row["exits"] else ""


def paper_budgets(run: Run) -> list[int]:
    """Which of the paper's budgets, in GB, ours stand for; 0 where there are not as many."""
    return [2, 6, 8] if len(run.budgets) == 3 else [0] * len(run.budgets)


def depths(run: Run) -> list[Exits]:
    """Kangaroo's exits: every adapter's, the usual shallow exit's the last."""
    if run.exits is None:
        return []
    return [(layer, run.exits[1]) for layer in run.adapters if layer <= run.exits[1]]


def table4(results: Results) -> list[Sheet]:
    """Bytes of weights a token, counted and by the paper's formula; and the paper's own rows by its formula."""
    run, lines = results.run, []
    rows = [("Baseline", PLAIN, None), *(("Kangaroo", "kangaroo", exits) for exits in depths(run)), ("CATS", "cascade_chain", None)]
    for pinning in (True, False):
        place = Place(run.budgets[-1], run.wires[0].rate, pinning)
        for name, label, exits in rows:
            if run.can(label):
                lines.append([*bytes_cells(results, place, name, label, exits), *speed_cells(results, place, label, exits)[:4]])
    head = ("method", "pinned", "streamed/token", "by the paper's formula", *SPEED_HEAD[:4])
    where = f"{run.name}, {amount(run.budgets[-1])} of weights, {Place(0, run.wires[0].rate).wire}"
    note = f"{where}. Streamed: counted, by the accepted length. {SPEED_NOTE}"
    return [Sheet("Table 4: bytes of weights per token", head, lines, note), paper_bytes(results)]


def bytes_cells(results: Results, place: Place, name: str, label: str, exits: Exits | None) -> list[str]:
    """Method, pinning, bytes a token as counted and by the paper's formula."""
    cell, row = results.cell(place, label, exits), results.row(label, exits)
    length, streamed = of(row, "accepted_length", CYCLE_BENCH), of(cell, "figures", "streamed_bytes_per_cycle")
    at = at_exits(row)
    counted = "does not fit" if of(cell, "refused") else amount(round(streamed / length)) if None not in (streamed, length) else "-"
    return [name + at, "yes" if place.pinning else "no", counted, formula_bytes(cell, length)]


def formula_bytes(cell: Row, length: float | None) -> str:
    """Bytes a token by the paper's formula."""
    shape = of(cell, "shape")
    nbytes = None if shape is None else paper_bytes_per_token(ModelShape(**shape), length)
    return "-" if nbytes is None else amount(round(nbytes))


def paper_bytes(results: Results) -> Sheet:
    """The paper's table 4 beside its formula."""
    layer, lines = results.paper["sources"]["cats"]["layer_gb"], []
    for row in results.paper["bytes_per_token"]["rows"]:
        again = recomputed_gb(row, layer)
        whole = round(again * row["accepted_length"] / layer)
        units = layer_units(row, layer)
        fits = "" if abs(units - whole) < 0.1 else ", no whole number"
        lines.append([row["method"], f"{row['gb_per_token']:.2f}", f"{again:.2f}", f"{units:.1f}{fits}", str(whole)])
    head = ("method", "printed, GB/token", "formula, GB/token", "layers that the printed bytes are", "layers of the formula")
    note = f"((n - 1) d + L) layers of {layer} GB over the printed accepted length. {results.paper['bytes_per_token']['where']}."
    return Sheet("The paper's table 4 and its formula", head, lines, note)


def table5(results: Results) -> list[Sheet]:
    """Accepted length and bytes by drafting steps; the paper's values, printed and by its formula."""
    layer, lines = results.paper["sources"]["cats"]["layer_gb"], []
    for theirs in results.paper["drafting_steps"]["rows"]:
        row = results.row(variant(STEPPED[theirs["method"]], steps=theirs["steps"]))
        again = recomputed_gb(theirs, layer)
        lines.append(
            [
                *(str(theirs["steps"]), theirs["method"]),
                with_interval(of(row, "accepted_length", CYCLE_BENCH), of(row, "accepted_length_interval", CYCLE_BENCH)),
                "-" if row is None else amount(round(row["layer_bytes_per_token"])),
                number(of(row, "layer_passes_per_token")),
                *(
                    f"{theirs['accepted_length']:.4f}",
                    f"{theirs['gb_per_token']:.4f}",
                    f"{again:.4f}",
                    f"{again - theirs['gb_per_token']:+.4f}",
                ),
            ]
        )
    head = (
        "steps",
        "method",
        "accepted length",
        "layer bytes/token",
        "layer passes/token",
        "paper: accepted",
        "GB/token",
        "by its formula",
        "difference",
    )
    note = (
        f"{results.run.name} on MT-bench, {results.run.work.questions} questions, all weights in memory; layer bytes: every layer pass "
        "counted. The paper charges CATS (3 (n - 1) + 32) layers a cycle, and Kangaroo and EAGLE-self (10 n + 32): "
        f"{results.paper['drafting_steps']['where']}."
    )
    return [Sheet("Table 5: drafting steps", head, lines, note)]


def ablations(results: Results) -> list[Sheet]:
    """What parts of CATS are worth in accepted length, and what parts of the runtime are worth in the time of a cycle."""
    lines = []
    for label, exits in ablated(results.run):
        row = results.row(label, exits)
        length = with_interval(of(row, "accepted_length", CYCLE_BENCH), of(row, "accepted_length_interval", CYCLE_BENCH))
        lines.append([title_of(label), of(row, "exits") or "-", length, number(of(row, "layer_passes_per_token"))])
    parts = Sheet(
        "What parts of CATS are worth",
        ("method", "exits", "accepted length", "layer passes/token"),
        lines,
        f"MT-bench. {setting(results).partition(' In brackets')[0]}",
    )
    cycles = []
    for place in ablated_places(results.run):
        for label in (PLAIN, "cascade_tree"):
            cell = results.cell(place, label)
            streamed = of(cell, "figures", "streamed_bytes_per_cycle")
            speed = bounds(of(cell, "figures", "tokens_per_second"), of(cell, "figures", "tokens_per_second_interval"), ".3f")
            cycles.append(
                [
                    place.label,
                    title_of(label),
                    number(of(cell, "figures", "cycle_seconds"), ".4f"),
                    "-" if streamed is None else amount(round(streamed)),
                    speed,
                ]
            )
    head = ("place", "method", "cycle, s", "streamed a cycle", "tokens/s")
    return [parts, Sheet("What pinning and the ring are worth", head, cycles, "In brackets 90 % intervals, by bootstrap over questions.")]


def ablated(run: Run) -> list[tuple[str, Exits | None]]:
    """Variants of CATS, and other shallow exits."""
    if run.exits is None:
        return []
    deeper: list[tuple[str, Exits | None]] = [("cascade_tree", (run.exits[0], layer)) for layer in run.adapters if layer not in run.exits]
    return [*((label, None) for label in TREE_VARIANTS), *deeper]


def ablated_places(run: Run) -> list[Place]:
    """The largest budget on the first wire: as it is, with a ring of one matrix, and with nothing pinned."""
    usual = Place(run.budgets[-1], run.wires[0].rate)
    return [usual, replace(usual, ring_buffers=1), replace(usual, pinning=False)]


def breakdown(results: Results) -> list[Sheet]:
    """Milliseconds a token by stage, place by place."""
    lines = []
    for place in (Place(), *headline(results.run)):
        for label in results.run.methods:
            figures = of(results.cell(place, label), "figures")
            if figures is not None and figures["accepted_length"]:
                stages = figures["stage_seconds_per_cycle"]
                names = ("draft", "shallow", "target", "accept", "stream_wait", "total")
                per_token = [number(1000 * stages.get(name, 0.0) / figures["accepted_length"], ".2f") for name in names]
                lines.append([place.label, title_of(label), *per_token])
    head = ("place", "method", "draft", "shallow", "target", "accept", "of these waiting for weights", "all")
    return [Sheet("Milliseconds a token", head, lines, "MT-bench, methods in turns, prompts left out; means over all cycles.")]


def resident_and_streamed(results: Results) -> list[Sheet]:
    """Speed-up with everything in memory, and streamed."""
    places, lines = [Place(), *headline(results.run)], []
    for label in results.run.methods:
        cells = [results.cell(place, label) for place in places]
        ups = [bounds(of(cell, "figures", "speed_up"), of(cell, "figures", "speed_up_interval")) for cell in cells]
        lines.append([title_of(label), *ups])
    note = "MT-bench, methods in turns, prompts left out; in brackets 90 % intervals, by bootstrap over questions."
    return [Sheet("Speed-up in memory and streamed", ["method", *(place.label for place in places)], lines, note)]


def quality(results: Results) -> list[Sheet]:
    """The points of figure 5."""
    lines = []
    for point in (results.quality or {"points": []})["points"]:
        figures = [
            bounds(point[name], point[f"{name}_interval"], form) for name, form in (("accepted_length", ".2f"), ("log_probability", ".3f"))
        ]
        shares = [number(point[name], ".1%") for name in ("best_share", "greedy_share")]
        same = "not lossless" if point["as_plain"] is None else f"{point['as_plain']} of {point['answers']}"
        lines.append([title_of(point["method"]), point["rule"], *figures, *shares, same])
    return [Sheet("Quality against speed", quality_curve.HEAD, lines, quality_curve.MEANINGS)]


def memory(results: Results) -> list[Sheet]:
    """Bytes by part: formula, ledger, and the whole process from outside."""
    sheets = []
    for record in results.memory:
        where = "everything in memory" if record["budget"] is None else f"{amount(record['budget'])} of weights"
        if "refused" in record:
            sheets.append(Sheet(f"{title_of(record['method'])}, {where}", ["does not fit"], []))
            continue
        formula, ledger = record["formula_parts"], record["ledger_parts"]
        parts = list(dict.fromkeys([*formula, *ledger]))
        lines = [[part, *(amount(column[part]) if part in column else "-" for column in (formula, ledger)), ""] for part in parts]
        total = ["all", amount(sum(formula.values())), amount(record["ledger"]), amount(record["process"])]
        note = (
            f"Of KV caches and activations, the tree's nodes take {amount(record['tree'])} by the formula. The ledger is "
            f"{record['ledger'] / record['process']:.3f} of the process as the kernel counts it."
        )
        sheets.append(Sheet(f"{title_of(record['method'])}, {where}", ("part", "formula", "ledger", "process"), [*lines, total], note))
    return [*sheets, contexts(results)]


def contexts(results: Results) -> Sheet:
    """Seconds to the first token and tokens per second over the length of the context."""
    lines = []
    for cell in sorted(results.context, key=lambda cell: (cell["settings"]["context"], cell["settings"]["place"]["budget_bytes"] or 0)):
        settings, figures = cell["settings"], cell.get("figures")
        spread, speed = "-", "does not fit"
        if figures is not None:
            least, *_, most = sorted([figures["prefill_seconds_median"], *figures["prefill_seconds"]])
            spread = f"{figures['prefill_seconds_median']:.2f} [{least:.2f}, {most:.2f}]"
            speed = bounds(figures["tokens_per_second"], figures["tokens_per_second_interval"])
        lines.append([str(settings["context"]), Place(**settings["place"]).label, title_of(settings["label"]), spread, speed])
    head = ("context", "weights", "method", "time to first token, s", "tokens/s")
    work = results.run.work
    note = (
        f"{work.context_turns} turn(s) each, methods in turns; prompts of MT-bench text, repeated; answers of {work.context_tokens} "
        "tokens. First token: median, least and most; tokens/s with 90 % intervals."
    )
    return Sheet("Over the length of the context", head, lines, note)
