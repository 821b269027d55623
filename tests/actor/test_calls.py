"""Calls in what a model wrote."""

import json

import pytest

from matpo_actor.calls import MAX_CALLS, parse


def one_call(text, syntax="json"):
    (call,) = parse(text, syntax).attempts
    return call


@pytest.mark.parametrize(
    "subtask",
    [
        'Who said "no"?',
        "close </tool_call> early",
        "braces } { and \\ backslash",
        "line\nbreak",
        "</arguments></use_mcp_tool>",
        "a < b & c",
    ],
)
@pytest.mark.parametrize("syntax", ["json", "xml"])
def test_quotes_and_tags_inside_a_subtask_end_nothing(subtask, syntax):
    if syntax == "json":
        body = json.dumps({"name": "worker", "arguments": {"subtask": subtask}})
        text = f"I ask.\n<tool_call>\n{body}\n</tool_call>"
    else:
        text = (
            "I ask.\n<use_mcp_tool>\n<server_name>agent</server_name>\n<tool_name>worker</tool_name>\n<arguments>\n"
            f"{json.dumps({'subtask': subtask})}\n</arguments>\n</use_mcp_tool>"
        )
    turn = parse(text, syntax)
    assert (turn.text, turn.calls[0].name, turn.calls[0].arguments) == ("I ask.", "worker", {"subtask": subtask})


def test_several_calls_keep_their_order_with_the_broken_one_in_its_place():
    turn = parse(
        '<tool_call>{"name": "a"}</tool_call> x <tool_call>{oops</tool_call><tool_call>{"name": "b"}</tool_call>',
        "json",
    )
    assert [getattr(a, "name", "broken") for a in turn.attempts] == ["a", "broken", "b"]
    assert turn.text == "x"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('<tool_call>{"name": "a"', "not valid JSON"),
        ('<tool_call>{"name": "a"}', "</tool_call> is missing"),
        ("<tool_call>[1]</tool_call>", "want"),
        ('<tool_call>{"name": 3}</tool_call>', "want"),
        ('<tool_call>{"name": "a", "arguments": [1]}</tool_call>', "must be a JSON object"),
        ('<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>', "NaN"),
        ("<tool_call>" + "[" * 100_000, "not valid JSON"),
        ('<tool_call>{"name": ' + "9" * 10_000 + "}</tool_call>", "not valid JSON"),
        ("<tool_call>", "not valid JSON"),
    ],
)
def test_a_call_that_does_not_parse_is_an_error_as_data(text, says):
    assert says in one_call(text).message


def test_a_broken_xml_call_is_an_error_as_data():
    assert "<tool_name> is missing" in one_call("<use_mcp_tool><arguments>{}</arguments></use_mcp_tool>", "xml").message
    assert "</arguments> is missing" in one_call("<use_mcp_tool><tool_name>a</tool_name><arguments>{}", "xml").message


def test_arguments_given_as_a_string_of_json_are_read():
    assert one_call('<tool_call>{"name": "a", "arguments": "{\\"k\\": 1}"}</tool_call>').arguments == {"k": 1}


@pytest.mark.parametrize(
    "text",
    [
        '<think>maybe <tool_call>{"name": "a"}</tool_call></think>The answer',
        'opened by the prompt <tool_call>{"name": "a"}</tool_call></think>The answer',
    ],
)
def test_a_call_inside_thinking_is_no_call(text):
    turn = parse(text, "json")
    assert (turn.text, turn.attempts) == ("The answer", ())


def test_thinking_that_never_closes_hides_everything_behind_it():
    assert parse('Hm. <think><tool_call>{"name": "a"}</tool_call>', "json") == parse("Hm.", "json")


def test_a_flood_of_calls_is_cut_and_the_model_is_told():
    turn = parse('<tool_call>{"name": "a"}</tool_call>' * 1000, "json")
    assert len(turn.calls) == MAX_CALLS
    assert "the rest was ignored" in turn.errors[0].message
