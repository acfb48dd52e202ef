"""Where the answer stands in a response: alone, between <answer> tags, or after the model's thinking."""

from __future__ import annotations

MAX_PADDED = 65536
"""Characters of a response whose blanks are stripped; a longer one is handed on as it is, to be refused for its length."""


def answer_text(response: str) -> str:
    """What stands in the last <answer> pair, else what follows the thinking, or is all there is, without blanks around it.

    Empty if a tag stays open, of the answer or of the thinking.
    """
    opening, closing = "<answer>", "</answer>"
    start = response.rfind(opening, 0, max(response.rfind(closing), 0))
    if start >= 0:
        response = response[start + len(opening) : response.find(closing, start)]
    elif opening in response:
        return ""
    else:
        response = split_thinking(response)[1] or ""
    return response.strip(" \t\r\n") if len(response) <= MAX_PADDED else response


def split_thinking(response: str) -> tuple[str, str | None]:
    """(thinking, answer): the answer is what follows the last </think>, all of it if there is no tag.

    None if a <think> stays open: the model has not come to an answer.
    """
    opening, closing = "<think>", "</think>"
    end = response.rfind(closing)
    if response.rfind(opening) > end:
        return response, None
    if end < 0:
        return "", response
    return response[:end].lstrip().removeprefix(opening), response[end + len(closing) :]
