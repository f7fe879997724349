"""The paper's figures from our result files (quantities.py): told apart by hatches and marks, legible in grey. Measures nothing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cats.planning.plan import LIBRARIES, amount
from evaluation import quality_curve
from evaluation.acceptance_report import PLAIN
from evaluation.cycles import Place
from evaluation.paper_tables import headline, of, paper_of, preset_of
from evaluation.presets import title_of
from evaluation.quantities import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREYS, HATCHES = ("#ffffff", "#bbbbbb", "#555555", "#ffffff", "#888888", "#dddddd", "#ffffff"), ("///", "", "", "...", "xx", "\\\\", "++")
FILLS = tuple(zip(GREYS, HATCHES, strict=True))
MARKS, LINES = "osv^D", ("-", "--", ":", "-.")
BROKEN_DOWN = (PLAIN, "kangaroo", "eagle_self_chain", "eagle_self_tree", "cascade_chain", "cascade_tree")
STAGES = {"draft": "drafting", "shallow": "shallow verification", "target": "target pass, arithmetic", "stream_wait": "waiting for weights"}


def canvas(width: float, height: float) -> "Figure":
    """An empty figure, inches."""
    from matplotlib.figure import Figure  # takes a second to load

    return Figure(figsize=(width, height), layout="constrained")


def short(label: str) -> str:
    """A method's title on at most two lines."""
    return title_of(label).replace(", ", "\n", 1).replace(" decoding", "\ndecoding").replace("EAGLE-self ", "EAGLE-self\n")


def grouped_bars(axes: "Axes", labels: Sequence[str], groups: Sequence[tuple[str, Sequence[Any]]]) -> None:
    """Bars side by side, with intervals: of each group its name and, by label, the figures of a cell or None."""
    width = 0.8 / max(1, len(groups))
    for place, (name, cells) in enumerate(groups):
        colour, hatch = FILLS[place % len(FILLS)]
        known = [(at, figures) for at, figures in enumerate(cells) if figures is not None and figures["speed_up"] is not None]
        across = [at + (place - (len(groups) - 1) / 2) * width for at, _ in known]
        along = [figures["speed_up"] for _, figures in known]
        reach = [
            [max(0.0, sign * (figures["speed_up_interval"][end] - figures["speed_up"])) for _, figures in known]
            for sign, end in ((-1, 0), (1, 1))
        ]
        error = {"elinewidth": 0.8, "capsize": 2}
        axes.bar(
            across,
            along,
            width,
            yerr=reach if known else None,
            error_kw=error,
            color=colour,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.6,
            label=name,
        )
    axes.set_xticks(range(len(labels)), [short(label) for label in labels], fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylabel("speed-up over plain decoding (x)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)


def figure1(results: Results) -> "Figure":
    """Speed-up by method and wire under the largest budget, the paper's beside it."""
    labels = [label for label in results.run.methods if label != PLAIN]
    figure = canvas(max(6.0, 1.25 * len(labels)), 4.5)
    axes = figure.add_subplot()
    groups = [(place.wire, [of(results.cell(place, label), "figures") for label in labels]) for place in headline(results.run)]
    grouped_bars(axes, labels, groups)
    paper = paper_of(results)
    printed = [(at, paper[preset_of(label)]["speed_up"]["mtbench"]) for at, label in enumerate(labels) if preset_of(label) in paper]
    at, speeds = [place for place, _ in printed], [speed for _, speed in printed]
    axes.plot(at, speeds, "D", color="black", markerfacecolor="white", label=f"paper, {results.paper_model}, Orin")
    figure.legend(
        loc="outside upper center",
        ncols=4,
        fontsize=8,
        title=f"{results.run.name}, MT-bench, {amount(results.run.budgets[-1])} of weights in memory",
    )
    return figure


def figure2(results: Results) -> "Figure":
    """Seconds a token by stage, a panel a place."""
    places = [Place(), *headline(results.run)]
    labels = [label for label in BROKEN_DOWN if label in results.run.methods]
    figure = canvas(max(8.0, 3.2 * len(places)), 5)
    for number, place in enumerate(places):
        axes = figure.add_subplot(1, len(places), number + 1)
        for at, label in enumerate(labels):
            figures = of(results.cell(place, label), "figures")
            if figures is not None and figures["accepted_length"]:
                stack_stages(axes, at, stages_of(figures))
        axes.set_xticks(
            range(len(labels)), [title_of(label) for label in labels], fontsize=8, rotation=60, ha="right", rotation_mode="anchor"
        )
        axes.set_title(place.label, fontsize=9)
        axes.set_ylabel("milliseconds a token" if number == 0 else "")
    for place_of, name in enumerate((*STAGES.values(), "the rest")):
        colour, hatch = FILLS[place_of]
        figure.axes[0].bar([0], [0], color=colour, hatch=hatch, edgecolor="black", label=name)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8, columnspacing=1)
    return figure


def stages_of(figures: dict[str, Any]) -> list[float]:
    """Milliseconds a token in the stages of `STAGES`, and in the rest; the target pass without its waiting."""
    spent, length = figures["stage_seconds_per_cycle"], figures["accepted_length"]
    seconds = {stage: spent.get(stage, 0.0) for stage in STAGES}
    seconds["target"] = max(0.0, seconds["target"] - seconds["stream_wait"])
    return [1000 * value / length for value in (*seconds.values(), max(0.0, spent["total"] - sum(seconds.values())))]


def stack_stages(axes: "Axes", at: float, values: Sequence[float], width: float = 0.7) -> None:
    """One stacked bar."""
    below = 0.0
    for place, value in enumerate(values):
        colour, hatch = FILLS[place % len(FILLS)]
        axes.bar([at], [value], width, bottom=below, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6)
        below += value


def figure3(results: Results) -> "Figure":
    """Speed-up with everything in memory, and streamed over each wire."""
    labels = [label for label in BROKEN_DOWN if label in results.run.methods and label != PLAIN]
    figure = canvas(8, 4.5)
    axes = figure.add_subplot()
    groups = [(place.label, [of(results.cell(place, label), "figures") for label in labels]) for place in (Place(), *headline(results.run))]
    grouped_bars(axes, labels, groups)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, title=f"{results.run.name}, MT-bench")
    return figure


def figure5(results: Results) -> "Figure":
    """See evaluation/quality_curve.py."""
    return quality_curve.picture(results.quality) if results.quality is not None else canvas(6, 4)


PARTS = {
    "interpreter": (LIBRARIES,),
    "head, table, norms": ("lm_head", "embedding table", "norms and biases"),
    "adapters, heads": ("adapters", "method resources"),
    "layers in memory": (),
    "ring": ("ring",),
    "KV caches": ("KV caches",),
    "activations": ("activations", "work space", "rotary tables"),
}
"""Parts of the picture by names of the ledger; whatever has no other place is layers."""


def parts_of(ledger: dict[str, int]) -> list[float]:
    """MB by part of the picture."""
    named = {name for names in PARTS.values() for name in names}
    layers = sum(nbytes for name, nbytes in ledger.items() if name not in named)
    return [(sum(ledger.get(name, 0) for name in names) if names else layers) / 1e6 for names in PARTS.values()]


def memory_figure(results: Results) -> "Figure":
    """Stacked by part: formula and ledger side by side, a mark for the process from outside; whole, and without the interpreter."""
    records = [record for record in results.memory if "refused" not in record]
    figure = canvas(max(8.0, 1.3 * len(records)), 8)
    for row, (what, first) in enumerate((("whole process", 0), ("without the interpreter", 1))):
        axes = figure.add_subplot(2, 1, row + 1)
        for at, record in enumerate(records):
            formula, ledger = (parts_of(record[f"{kind}_parts"]) for kind in ("formula", "ledger"))
            stack_stages(axes, at - 0.2, [0.0] * first + formula[first:], 0.36)
            stack_stages(axes, at + 0.2, [0.0] * first + ledger[first:], 0.36)
            axes.plot(
                [at + 0.2], [record["process"] / 1e6 - sum(ledger[:first])], "D", color="black", markerfacecolor="white", markersize=5
            )
        names = [f"{short(record['method'])}\n{amount(record['budget']) if record['budget'] else 'all in memory'}" for record in records]
        axes.set_xticks(range(len(records)), names, fontsize=7)
        axes.set_ylabel(f"{what}, MB")
        axes.set_ylim(bottom=0)
    for place, name in enumerate(PARTS):
        colour, hatch = FILLS[place]
        figure.axes[0].bar([0], [0], color=colour, hatch=hatch, edgecolor="black", label=name)
    figure.axes[0].plot([], [], "D", color="black", markerfacecolor="white", linestyle="none", label="process from outside, peak")
    title = "left bar: formula of the plan; right bar: ledger at its peak"
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8, title=title)
    return figure


def context_figure(results: Results) -> "Figure":
    """Seconds to the first token, and tokens per second, over the context."""
    figure = canvas(9, 4)
    first, second = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in sorted((cell for cell in results.context if "figures" in cell), key=lambda cell: cell["settings"]["context"]):
        settings = cell["settings"]
        groups.setdefault((Place(**settings["place"]).label, settings["label"]), []).append(cell)
    for place, ((where, label), cells) in enumerate(groups.items()):
        style: dict[str, Any] = {
            "marker": MARKS[place % len(MARKS)],
            "linestyle": LINES[place % len(LINES)],
            "color": "black",
            "markerfacecolor": "white",
        }
        across = [cell["settings"]["context"] for cell in cells]
        first.plot(across, [cell["figures"]["prefill_seconds_median"] for cell in cells], label=f"{title_of(label)}; {where}", **style)
        second.plot(across, [cell["figures"]["tokens_per_second"] for cell in cells], **style)
    for axes, name in ((first, "seconds to the first token"), (second, "tokens per second, behind the prompt")):
        axes.set_xlabel("context (positions, prompt and answer)")
        axes.set_xticks(sorted({cell["settings"]["context"] for cell in results.context}))
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(color="#dddddd", linewidth=0.5)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure
