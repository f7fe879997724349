"""The live view: rows, lines and pictures of steps whose times are known by hand, and the flags of the evaluation command."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cats
from cats import CatsError, Generation
from cats.methods import needs_of
from cats.trace import StageSeconds, StepTrace, Stopwatch
from evaluation import CATS_dynamic, live_view
from evaluation.live_view import LiveView, cycle_record, ended, joined, lanes_of, parse_range, read_cycles, table
from evaluation.record_file import append_record, read_records
from tests.methods import SHAPES, memory_for
from tests.test_options import paths, questions
from tests.tiny_models import TinyModel

LABEL = {"model_id": "m", "run": 0, "question_id": 81, "turn": 1}
HALF = StageSeconds(target=0.5, total=0.5)
PREFILL = StepTrace(True, 1, 0, 1, layer_passes=6, started=100.0, seconds=HALF, spans=(("target", 100.0, 100.5),))
CYCLE = StepTrace(
    prefill=False,
    nodes=4,
    accepted=1,
    committed=2,
    shallow_accepted=1,
    layer_passes=9,
    bytes_streamed=3_000_000,
    seconds=StageSeconds(draft=0.25, shallow=0.25, target=0.5, total=1.0, compute=0.9, stream_wait=0.125),
    started=200.0,
    spans=(("draft", 200.0, 200.25), ("shallow", 200.25, 200.5), ("target", 200.5, 201.0)),
)
LATER = dataclasses.replace(CYCLE, started=201.0, spans=tuple((stage, begin + 1, end + 1) for stage, begin, end in CYCLE.spans))


class Reader:
    """Reads and waits as a streamer notes them."""

    record = False
    events = (
        (90.0, 95.0, "before the run", 7),
        (199.5, 200.5, "a", 1_000_000),
        (200.5001, 200.75, "b", 2_000_000),
        (200.9, 201.25, "c", 1_000_000),
    )
    waits = ((200.5, 200.75), (200.8, 200.80001))


def told(view: LiveView, *traces: StepTrace) -> None:
    view.begin_turn(LABEL)
    view.end_turn(Generation([1, 2], "length", list(traces)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run begins when `perf_counter` says 99."""
    monkeypatch.setattr("time.perf_counter", lambda: 99.0)
    monkeypatch.setattr("time.time", lambda: 1099.0)


def test_a_stage_that_follows_on_itself_is_one_span() -> None:
    watch = Stopwatch()
    for name in ("draft", "shallow", "shallow", "draft"):
        with watch.stage(name):
            pass
    assert [name for name, _, _ in watch.spans] == ["draft", "shallow", "draft"]
    moments = [moment for _, begin, end in watch.spans for moment in (begin, end)]
    assert moments == sorted(moments)
    assert watch.started <= moments[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_spans_lie_in_the_step_and_make_up_its_stages(tiny: Callable[[str], TinyModel], shape: str) -> None:
    model = tiny("llama")
    adapters = {name: (getattr(model, name), None) for name in needs_of(SHAPES[shape]).adapters}
    loaded = cats.load(model.base, adapters, "float32", "cpu", memory_for(shape))
    answer = cats.generate(loaded, [5, 6, 7, 8], SHAPES[shape], cats.GenerationConfig(max_new_tokens=12))
    for trace in answer.traces:
        assert trace.spans[-2][0] == "target"
        for stage in ("draft", "shallow", "target", "accept"):
            spans = [(begin, end) for name, begin, end in trace.spans if name == stage]
            assert all(trace.started <= begin <= end <= trace.started + trace.seconds.total for begin, end in spans)
            assert sum(end - begin for begin, end in spans) == pytest.approx(trace.seconds[stage], abs=2e-3)


def test_a_line_says_what_a_cycle_did_and_when(tmp_path: Path, clock: None) -> None:
    file, reader = tmp_path / "t.jsonl", Reader()
    told(LiveView(None, file, reader), PREFILL, CYCLE, LATER)
    prompt, cycle, later = read_records(file)
    assert reader.record
    assert {name: prompt[name] for name in LABEL} == LABEL
    assert (prompt["cycle"], prompt["prefill"], prompt["started"], prompt["reads"]) == (0, True, 1100.0, [])
    assert (cycle["cycle"], cycle["committed"], cycle["bytes_streamed"]) == (1, 2, 3_000_000)
    assert cycle["seconds"] == dict(CYCLE.seconds)
    assert cycle["spans"] == [["draft", 0.0, 0.25], ["shallow", 0.25, 0.5], ["target", 0.5, 1.0]]
    assert cycle["reads"] == [[-0.5, 0.75, 3_000_000]]
    assert cycle["waits"] == [[0.5, 0.75]]
    assert later["reads"] == [[-0.1, 0.25, 1_000_000]], "a read belongs to the cycle in which it ended"


def test_steps_that_come_one_by_one_are_not_told_again() -> None:
    rows: list[str] = []
    view = LiveView(rows.append, None)
    view.step(PREFILL)
    view.begin_turn(LABEL)
    view.step(PREFILL)
    view.step(CYCLE)
    assert len(rows) == 3, "two rows below the heading, the warm-up's left out"
    view.end_turn(Generation([1], "length", [PREFILL, CYCLE, LATER]))
    assert rows[0].split()[:3] == ["question", "turn", "cycle"]
    assert rows[1].split() == ["81", "1", "prompt", "0.000", "0.000", "0.500", "0.000", "0.500", "0.0", "1", "0", "1"]
    assert rows[2].split() == ["81", "1", "1", "0.250", "0.250", "0.500", "0.125", "1.000", "3.0", "4", "1", "2"]
    assert len(rows) == 4
    assert len({len(text) for text in rows}) == 1


def test_reads_that_follow_on_each_other_are_one() -> None:
    assert joined([(0.0, 1.0, "a", 5), (1.0005, 2.0, "b", 6), (2.5, 3.0, "c", 7)]) == [(0.0, 2.0, 11), (2.5, 3.0, 7)]
    spans = [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 4.0)]
    assert ended(spans, 1.0, 3.0) == spans[1:3]


def test_an_answer_begun_again_leaves_nothing_of_its_first_attempt_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    for question, cycle in [(81, 0), (81, 1), (81, 2), (82, 0), (81, 0), (81, 1)]:
        append_record(file, cycle_record({**LABEL, "question_id": question, "cycle": cycle}, CYCLE, (), (), 0.0), durable=False)
    with file.open("a") as stream:
        stream.write('{"model_id": "m", "ru')
    assert [(record["question_id"], record["cycle"]) for record in read_cycles(file)] == [(82, 0), (81, 0), (81, 1)]


def test_lanes_are_bars_since_the_first_cycle(tmp_path: Path, clock: None) -> None:
    file = tmp_path / "t.jsonl"
    told(LiveView(None, file, Reader()), CYCLE, LATER)
    lanes = lanes_of(read_cycles(file))
    assert list(lanes) == ["draft", "shallow", "target", "waiting", "reader"]
    assert lanes["draft"] == [(0.0, 0.25), (1.0, 0.25)]
    assert lanes["waiting"] == [(0.5, 0.25)]
    assert lanes["reader"] == [pytest.approx((-0.5, 1.25)), pytest.approx((0.9, 0.35))]


def test_the_command_prints_the_table_and_draws_the_picture(tmp_path: Path, clock: None, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "t.jsonl", tmp_path / "t.png"
    told(LiveView(None, file, Reader()), PREFILL, CYCLE, LATER)
    live_view.main([str(file), "--timeline", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[:4]] == ["cycle", "prompt", "1", "2"]
    assert lines[5] == (
        "m: 2 cycles, 2.00 tokens and 1.000 s each (draft 25 %, shallow 25 %, target 50 %, stream wait 12 %), 1.5 MB read per token"
    )
    assert lines[6] == f"3 cycles drawn in {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")
    live_view.main([str(file), "--cycles", "1:2"])
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[:2]] == ["cycle", "1"]


REFUSALS: dict[str, tuple[list[str], str]] = {
    "no file": (["absent.jsonl"], "there is no file absent.jsonl"),
    "an empty file": (["empty.jsonl"], "empty.jsonl holds no cycle yet"),
    "answers": (["answers.jsonl"], "line 1 of answers.jsonl has no 'turn'"),
    "no range": (["t.jsonl", "--cycles", "3"], "--cycles '3' is no range"),
    "a range behind the end": (["t.jsonl", "--cycles", "1:"], "--cycles 1: holds none of the 1 cycles"),
    "no picture": (["t.jsonl", "--timeline", "t.mp4"], "let the name end in .png, .svg, .pdf"),
    "no folder for the picture": (["t.jsonl", "--timeline", "t.jsonl/t.png"], "t.jsonl"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    append_record(Path("answers.jsonl"), {"question_id": 1, "choices": []})
    told(LiveView(None, Path("t.jsonl")), CYCLE)
    flags, sentence = REFUSALS[name]
    with pytest.raises(SystemExit) as stopped:
        live_view.main(flags)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


def test_ranges() -> None:
    assert [parse_range(text) for text in ("2:5", ":5", "2:", ":")] == [slice(2, 5), slice(None, 5), slice(2, None), slice(None)]
    with pytest.raises(CatsError, match="no range"):
        parse_range("-1:3")


def test_the_evaluation_command_shows_and_writes_every_cycle(
    speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, file, output = questions(tmp_path, ("one",), ("two", "more")), tmp_path / "t.jsonl", tmp_path / "o"
    flags = ["--model-id", "m", "--question-file", asked, "--output-dir", str(output), "--max-new-tokens", "6", "--device", "cpu"]
    flags += ["--baseline", "--live", "--trace-file", str(file), *paths(speaking, "draft", "shallow")]
    CATS_dynamic.main(flags)
    written = read_cycles(file)
    expected = steps(output / "0.jsonl", "m") | steps(output / "0.baseline.jsonl", "m.baseline")
    assert {key(record): record["committed"] for record in written if not record["prefill"]} == expected
    assert sum(record["prefill"] for record in written) == 6
    shown = [line for line in capsys.readouterr().err.splitlines() if line.split()[1:2] in (["0"], ["1"])]
    assert len(shown) == len(written)


def test_rows_come_while_the_answer_is_made(
    speaking: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before_the_end: list[str] = []

    def end_turn(view: LiveView, generation: Generation) -> None:
        before_the_end.append(capsys.readouterr().err)

    monkeypatch.setattr(LiveView, "end_turn", end_turn)
    flags = ["--model-id", "m", "--question-file", questions(tmp_path, ("one",)), "--output-dir", str(tmp_path / "o"), "--device", "cpu"]
    CATS_dynamic.main([*flags, "--max-new-tokens", "6", "--live", "--method", "autoregressive", *paths(speaking)])
    assert sum(line.split()[1:2] == ["0"] for line in before_the_end[0].splitlines()) == 6


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["model_id"], record["question_id"], record["turn"], record["cycle"]


def steps(answers: Path, model_id: str) -> dict[tuple[Any, ...], int]:
    """Tokens committed in every cycle, as the answer file has them."""
    return {
        (model_id, record["question_id"], turn, cycle): committed
        for record in map(json.loads, answers.read_text().splitlines())
        for turn, steps in enumerate(record["choices"][0]["steps"])
        for cycle, committed in enumerate(steps["committed"], start=1)
    }


def test_a_trace_file_that_cannot_be_written_is_refused_first(
    speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model-id", "m", "--output-dir", str(tmp_path / "o"), "--method", "autoregressive", *paths(speaking)]
    for place in (tmp_path / "absent" / "t.jsonl", tmp_path):
        with pytest.raises(SystemExit) as stopped:
            CATS_dynamic.main([*flags, "--trace-file", str(place)])
        assert stopped.value.code == 2
        assert f"--trace-file {place} cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_stage_of_a_methods_own_has_a_column_and_a_share_and_a_lane(capsys: pytest.CaptureFixture[str]) -> None:
    own = dataclasses.replace(CYCLE, seconds=StageSeconds(CYCLE.seconds, lookup=0.5), spans=(("lookup", 200.0, 200.5),))
    shown: list[str] = []
    view = LiveView(shown.append, None)
    view.begin_turn(LABEL)
    view.step(CYCLE)
    view.step(own)
    assert [line for line in shown if "lookup s" in line] == [shown[2]], "a second heading where the stage first comes up"
    assert shown[3].split()[6] == "0.500"
    record = cycle_record(LABEL | {"cycle": 0}, own, [], [], 0.0)
    assert "lookup s" in table([record]).splitlines()[0]
    assert "lookup 50 %" in table([record])
    assert "lookup" in lanes_of([record])
