"""`cats serve` from outside: OpenAI's own client, raw requests and sockets against a server that runs; texts are the library's."""

import asyncio
import http.client
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import cats
from cats.cli.serve import main
from cats.serve import answering
from cats.serve.asked import read_asked
from cats.serve.desk import Desk
from cats.writers import WRITERS
from tests.answering_server import NAME, Gate, Served, asked, load_tiny, serving, until

QUESTIONS = ("Hello there", "Tell me a story about two brothers.", "Was ist 2 + 3? \u00e9\u00df\u20ac")
METHOD = cats.CascadeConfig(tree_topk=4, total_tokens=24)
DOCS = Path(__file__).resolve().parent.parent / "docs" / "serve.md"


@pytest.fixture(scope="module")
def model() -> cats.CatsModel:
    return load_tiny()


@pytest.fixture(scope="module")
def served(model: cats.CatsModel) -> Iterator[Served]:
    with serving(model, cats.build_method(METHOD, model)) as server:
        yield server


def said(model: cats.CatsModel, question: str, **settings: Any) -> cats.Answer:
    return model.chat(question, METHOD, **settings)


def streamed(served: Served, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, as they came."""
    response = served.post(asked(stream=True, **fields))
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def content(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


@pytest.mark.parametrize("question", QUESTIONS)
def test_whole_and_streamed_answers_are_the_librarys(served: Served, model: cats.CatsModel, question: str) -> None:
    expected = said(model, question, max_new_tokens=40)
    client = served.client()
    messages: Any = [{"role": "user", "content": question}]
    whole = client.chat.completions.create(model=NAME, messages=messages, max_tokens=40)
    stream = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=40, stream=True)
    assert whole.choices[0].message.content == expected.text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected.text
    assert whole.choices[0].finish_reason == {"eos": "stop", "length": "length"}[expected.finish]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(expected.ids)
    assert whole.usage.prompt_tokens == len(model.text.prompt_ids(question))


def test_the_model_is_listed(served: Served) -> None:
    (listed,) = served.client().models.list().data
    assert listed.id == NAME
    assert served.client().models.retrieve(NAME) == listed
    about = httpx.get(f"{served.address}/v1/models").json()["data"][0]["cats"]
    assert about == {"method": METHOD.label((2, 6)), "budget": "no memory budget", "wire": "nothing streamed", "context": 2048}


def test_a_stream_says_who_wrote_each_token_and_what_it_cost(served: Served, model: cats.CatsModel) -> None:
    expected = said(model, QUESTIONS[1], max_new_tokens=64)
    chunks = streamed(served, question=QUESTIONS[1], max_tokens=64, stream_options={"include_usage": True})
    pieces = [piece for chunk in chunks for piece in chunk["cats"]["pieces"]]
    assert "".join(piece["text"] for piece in pieces) == content(chunks) == expected.text
    writers = [piece["by"] for piece in pieces]
    assert set(writers) <= set(WRITERS)
    assert {"draft", "target"} < set(writers)
    accepted = sum(trace.accepted for trace in expected.traces)
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    usage = chunks[-1]["usage"]
    assert usage["completion_tokens_details"]["accepted_prediction_tokens"] == accepted
    assert usage["cats"]["target_passes"] == len(expected.traces) - 1
    assert usage["cats"]["tokens"] / usage["cats"]["target_passes"] == expected.accepted_length
    assert usage["total_tokens"] == usage["prompt_tokens"] + len(expected.ids)


@pytest.mark.parametrize("begin", range(3, 12))
def test_a_stop_string_ends_before_itself_wherever_tokens_end(served: Served, model: cats.CatsModel, begin: int) -> None:
    whole = said(model, QUESTIONS[1], max_new_tokens=40).text
    stop = whole[begin : begin + 4]
    expected = whole.partition(stop)[0].strip()
    answer = served.post(asked(QUESTIONS[1], max_tokens=40, stop=["never said", stop])).json()
    chunks = streamed(served, question=QUESTIONS[1], max_tokens=40, stop=stop)
    assert answer["choices"][0]["message"]["content"] == content(chunks) == expected
    assert answer["choices"][0]["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_next_turn_reads_only_what_is_new(served: Served, model: cats.CatsModel) -> None:
    messages = [{"role": "user", "content": QUESTIONS[1]}]
    first = served.post({"model": NAME, "messages": messages, "max_tokens": 24}).json()
    messages += [first["choices"][0]["message"], {"role": "user", "content": "Go on."}]
    second = served.post({"model": NAME, "messages": messages, "max_tokens": 24}).json()
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    assert second["choices"][0]["message"]["content"] == model.chat(plain, METHOD, max_new_tokens=24).text
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert first["usage"]["prompt_tokens"] <= cached < second["usage"]["prompt_tokens"]


def test_the_commands_of_the_docs_run(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    text = DOCS.read_text(encoding="utf-8").replace("http://127.0.0.1:8000", served.address).replace("SmolLM2-135M-Instruct", NAME)
    blocks = dict(re.findall(r"^```(python|sh)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))
    exec(compile(blocks["python"], DOCS.name, "exec"), {})
    assert "'draft'" in capsys.readouterr().out
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    ended = subprocess.run(["sh", "-c", blocks["sh"]], capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout)["object"] == "chat.completion"


def test_a_seed_repeats_an_answer(served: Served, model: cats.CatsModel) -> None:
    settings = {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "seed": 7}
    expected = said(model, QUESTIONS[1], max_new_tokens=24, **settings).text
    texts = {served.post(asked(QUESTIONS[1], max_tokens=24, **settings)).json()["choices"][0]["message"]["content"] for _ in range(2)}
    assert texts == {expected}
    unseeded = {"temperature": 2.0, "max_tokens": 24}
    texts = {served.post(asked(QUESTIONS[1], **unseeded)).json()["choices"][0]["message"]["content"] for _ in range(3)}
    assert len(texts) > 1
    greedy = served.post(asked(QUESTIONS[1], max_tokens=24, temperature=0, top_p=0.5)).json()["choices"][0]["message"]["content"]
    assert greedy == said(model, QUESTIONS[1], max_new_tokens=24).text


def test_what_says_nothing_new_is_taken(served: Served) -> None:
    fields = {
        "n": 1,
        "frequency_penalty": 0.0,
        "logprobs": False,
        "tools": [],
        "user": "me",
        "seed": None,
        "response_format": {"type": "text"},
    }
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "Hi.", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "More."},
    ]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]
    plain += [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "More."}]
    texts = [
        served.post({"model": NAME, "messages": given, "max_tokens": 8, **fields}).json()["choices"][0]["message"]["content"]
        for given in (messages, plain)
    ]
    assert texts[0] == texts[1]


DEEP = "[" * 100_000
REFUSED: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "another model": ({"model": "gpt-9"}, "model", "model_not_found"),
    "no model": ({"model": None}, "model", "missing_required_parameter"),
    "no messages": ({"messages": []}, "messages", "missing_required_parameter"),
    "too many messages": ({"messages": [{"role": "user", "content": "x"}] * 1025}, "messages", "array_above_max_length"),
    "a message that is none": ({"messages": ["Hi"]}, "messages[0]", "invalid_type"),
    "an unknown role": ({"messages": [{"role": "oracle", "content": "x"}]}, "messages[0].role", "invalid_value"),
    "a role that is no text": ({"messages": [{"role": [], "content": "x"}]}, "messages[0].role", "invalid_value"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "unsupported_value"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_type"),
    "a named speaker": ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name", "unsupported_value"),
    "half a character": ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "invalid_value"),
    "several answers": ({"n": 2}, "n", "unsupported_value"),
    "true for a number": ({"n": True}, "n", "unsupported_value"),
    "a penalty": ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_value"),
    "probabilities": ({"logprobs": True}, "logprobs", "unsupported_value"),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "unsupported_value"),
    "JSON answers": ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
    "an unknown field": ({"min_p": 0.1}, "min_p", "unknown_parameter"),
    "a temperature of text": ({"temperature": "warm"}, "temperature", "invalid_type"),
    "too hot": ({"temperature": 2.5}, "temperature", "invalid_value"),
    "a huge temperature": ({"temperature": 10**400}, "temperature", "invalid_value"),
    "nothing of the distribution": ({"temperature": 1, "top_p": 0}, "top_p", "invalid_value"),
    "top_p where nothing is sampled": ({"top_p": 0.5}, "top_p", "invalid_value"),
    "top_k where nothing is sampled": ({"top_k": 5}, "top_k", "invalid_value"),
    "half a seed": ({"seed": 0.5}, "seed", "invalid_type"),
    "a seed too large": ({"seed": 2**63}, "seed", "invalid_value"),
    "no tokens": ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    "two lengths": ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "invalid_value"),
    "an empty stop": ({"stop": ["a", ""]}, "stop", "invalid_value"),
    "too many stops": ({"stop": list("abcde")}, "stop", "array_above_max_length"),
    "a stop of numbers": ({"stop": [1]}, "stop", "invalid_type"),
    "a long stop": ({"stop": "x" * 257}, "stop", "string_above_max_length"),
    "a stream of sorts": ({"stream": "yes"}, "stream", "invalid_type"),
    "options without a stream": ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    "an unknown option": ({"stream": True, "stream_options": {"speed": 2}}, "stream_options.speed", "unsupported_value"),
    "an answer beyond the context": ({"max_tokens": 2048}, "max_tokens", "context_length_exceeded"),
    "a prompt beyond the context": ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages", "context_length_exceeded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_field(served: Served, name: str) -> None:
    changes, param, code = REFUSED[name]
    body = json.dumps(asked("Hi.") | changes)
    response = served.post(content=body.encode(), headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == (404 if code == "model_not_found" else 400)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert error["message"].endswith(".")


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b"[1]", b'"x"', DEEP.encode(), b'{"a": 1' + b"0" * 5000 + b"}"], ids=range(7))
def test_what_is_no_object_is_refused(served: Served, body: bytes) -> None:
    response = served.post(content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


def test_bodies_are_bounded(served: Served) -> None:
    large = json.dumps(asked("x" * 2**20)).encode()
    headers = {"Content-Type": "application/json"}
    for given in (large, iter([large[: 2**19], large[2**19 :]])):
        response = served.post(content=given, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


def test_web_pages_of_others_cannot_ask(served: Served) -> None:
    """A form sends no JSON; a name that was made to point here is not ours."""
    assert served.post(content=json.dumps(asked("Hi.")).encode(), headers={"Content-Type": "text/plain"}).status_code == 415
    elsewhere = served.post(asked("Hi."), headers={"Host": "evil.example:80"})
    assert (elsewhere.status_code, elsewhere.json()["error"]["code"]) == (421, "wrong_host")
    assert httpx.get(served.address.replace("127.0.0.1", "localhost")).status_code == 200


def test_other_places_and_deeds_are_refused_in_the_same_form(served: Served) -> None:
    nowhere = httpx.get(f"{served.address}/v1/embeddings")
    wrong = httpx.get(f"{served.address}/v1/chat/completions")
    assert (nowhere.status_code, wrong.status_code) == (404, 405)
    assert nowhere.json()["error"]["code"] == "not_found"
    assert "POST" in wrong.headers["allow"]
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here, only 'tiny'"):
        served.client().models.retrieve("other")


def test_a_key_is_asked_for(model: cats.CatsModel) -> None:
    with serving(model, api_key="secret") as served:
        assert served.client("secret").models.list().data[0].id == NAME
        for client in (served.client("Secret"), served.client("secret2")):
            with pytest.raises(openai.AuthenticationError, match="the API key is wrong or missing"):
                client.models.list()
        assert served.post(asked("Hi.")).status_code == 401
        assert httpx.get(served.address).status_code == 200


@pytest.fixture
def gated(model: cats.CatsModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Served, Gate]]:
    method = cats.build_method(METHOD, model)
    gate = Gate(method.propose)
    monkeypatch.setattr(method, "propose", gate)
    with serving(model, method, places=1) as server:
        yield server, gate
        gate.open()


def begin(served: Served, **fields: Any) -> socket.socket:
    """Send a request and do not wait for its answer."""
    body = json.dumps(asked(QUESTIONS[1], **fields)).encode()
    place = served.connect()
    place.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    place.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return place


def answered(place: socket.socket) -> dict[str, Any]:
    response = http.client.HTTPResponse(place)
    response.begin()
    found: dict[str, Any] = json.loads(response.read())
    return found


def test_who_finds_the_line_full_is_told_when_to_come_again(gated: tuple[Served, Gate], model: cats.CatsModel) -> None:
    served, gate = gated
    first = begin(served, max_tokens=8)
    until(lambda: gate.begun == 1)
    second = begin(served, max_tokens=8)
    until(lambda: served.desk.inside == 2)
    with pytest.raises(openai.RateLimitError, match="2 requests are here already") as refused:
        served.client().chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hi."}])
    assert int(refused.value.response.headers["Retry-After"]) >= 1
    gate.open()
    expected = said(model, QUESTIONS[1], max_new_tokens=8).text
    assert [answered(place)["choices"][0]["message"]["content"] for place in (first, second)] == [expected] * 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_answer(gated: tuple[Served, Gate], model: cats.CatsModel, stream: bool) -> None:
    served, gate = gated
    leaving = begin(served, max_tokens=200, stream=stream)
    until(lambda: gate.begun == 1)
    waiting = begin(served, max_tokens=200)
    until(lambda: served.desk.inside == 2)
    waiting.close()
    until(lambda: served.desk.inside == 1)
    leaving.close()
    until(lambda: served.desk.inside == 0)
    gate.open()
    answer = served.post(asked(QUESTIONS[0], max_tokens=20)).json()
    expected = said(model, QUESTIONS[0], max_new_tokens=20)
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert gate.begun == 1 + len(expected.traces) - 1


def test_a_client_that_does_not_read_ends_its_answer(model: cats.CatsModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "SEND_SECONDS", 0.01)
    desk = Desk(model, cats.build_method(METHOD, model), places=1)
    request = read_asked(json.dumps(asked("Hi.", stream=True)).encode(), temperature=0, seed=0)

    async def never(*given: Any) -> Any:
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        asyncio.run(answering.Answering(desk, NAME, model.text.prompt_ids("Hi."), request)({}, never, never))
    assert desk.inside == 0


def test_the_page_needs_nothing_from_elsewhere(served: Served) -> None:
    response = httpx.get(served.address)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not [word for word in ("innerHTML", "//cdn", "https://", "<link", "src=") if word in response.text]
    assert all(writer in response.text for writer in WRITERS)


def test_a_port_in_use_is_one_sentence(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    port = served.address.rpartition(":")[2]
    with pytest.raises(SystemExit) as stopped:
        main(["--port", port])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"error: cannot listen at 127.0.0.1, port {port}: Address already in use; give another --host or --port.\n"
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--queue", "-1"], "--queue is -1"),
        (["--api-key", "two words"], "must be one word"),
        (["--host", "nowhere.invalid"], "cannot listen at nowhere.invalid"),
        (["--max-new-tokens", "0"], "max-new-tokens is 0"),
    ],
)
def test_flags_that_cannot_be_are_one_sentence(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    captured = capsys.readouterr().err
    assert (stopped.value.code, captured.count("\n")) == (2, 1)
    assert sentence in captured
