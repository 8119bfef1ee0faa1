"""Exports: conversations exported from Gemini and ChatGPT, converted to records with `messages`.

Gemini   {"systemInstruction": …, "contents": [{"role": "user", "parts": [{"text": …}]}, …]}   (Vertex AI tunes on it)
ChatGPT  {"title": …, "mapping": {node: {"message": …, "parent": node}}, "current_node": node}  (conversations.json)
"""

from collections.abc import Iterator, Mapping
from typing import Any

from atomtune.data.formats.fields import is_empty

Json = dict[str, Any]
_SYSTEM = ("systemInstruction", "system_instruction")
_DECLARATIONS = ("functionDeclarations", "function_declarations")


def as_messages(record: Json) -> tuple[Json, tuple[str, ...]]:
    """The record with its conversation under `messages`, and notes about it; any other record unchanged."""
    if "messages" in record:
        return record, ()
    if _is_of_gemini(record):
        return _from_gemini(record), ('"contents" (Gemini) is read as messages',)
    mapping, shown = record.get("mapping"), record.get("current_node")
    if isinstance(mapping, dict) and isinstance(shown, str) and shown in mapping:
        return _from_chatgpt(record)
    return record, ()


def _is_of_gemini(record: Json) -> bool:
    contents = record.get("contents")
    return isinstance(contents, list) and all(isinstance(one, dict) and "parts" in one for one in contents)


def _from_gemini(record: Json) -> Json:
    others = {key: value for key, value in record.items() if key not in ("contents", *_SYSTEM)}
    messages: list[Json] = []
    for key in _SYSTEM:
        if record.get(key) is not None:
            messages.append({"role": "system", "content": _parts(record[key])})
    for content in record["contents"]:
        role = content.get("role", "user")  # the API's own default
        parts = _parts(content)
        answers = [part for part in parts if isinstance(part, dict) and part.get("type") == "tool_result"]
        messages += [
            {"role": "tool", "name": part["name"], "tool_call_id": part["id"], "content": part["content"]}
            for part in answers
        ]
        rest = [part for part in parts if part not in answers]
        if rest or not answers:
            messages.append({"role": role, "content": rest})
    if isinstance(record.get("tools"), list):
        others["tools"] = [tool for entry in record["tools"] for tool in _declared(entry)]
    return {**others, "messages": messages}


def _parts(content: Any) -> list[Any]:
    """The parts of a Gemini message, each as a content part with a `type`.

    A system instruction may also be a text, a part or a list of both, as Google's clients accept it.
    """
    parts = content.get("parts", content) if isinstance(content, dict) else content
    listed = parts if isinstance(parts, list) else [parts]
    return [_typed(part) if isinstance(part, dict) else part for part in listed]


def _typed(part: Json) -> Json:
    call = part.get("functionCall", part.get("function_call"))
    answer = part.get("functionResponse", part.get("function_response"))
    if isinstance(call, dict):
        return {"type": "tool_use", "id": call.get("id"), "name": call.get("name"), "input": call.get("args", {})}
    if isinstance(answer, dict):
        name, response = answer.get("name", ""), answer.get("response", "")
        return {"type": "tool_result", "id": answer.get("id"), "name": name, "content": response}
    if "text" in part:
        return {"type": "thinking" if part.get("thought") else "text", "text": part["text"]}
    return {"type": next(iter(part), "")}  # inlineData, fileData, …: refused later, by this type


def _declared(entry: Any) -> list[Any]:
    """The tools of one entry of Gemini's `tools`, in OpenAI's form."""
    for key in _DECLARATIONS:
        if isinstance(entry, dict) and isinstance(entry.get(key), list):
            return [{"type": "function", "function": tool} for tool in entry[key]]
    return [entry]


def _from_chatgpt(record: Json) -> tuple[Json, tuple[str, ...]]:
    notes = ['"mapping" (an export of ChatGPT) is read as messages']
    messages: list[Json] = []
    for node in reversed(list(_up(record))):
        entry = node.get("message")
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), dict):
            continue
        messages += _said(entry)
        if (_is_of_a_tool(entry) or not _is_text(entry)) and len(notes) == 1:
            notes.append("thoughts, searches, code and other work between a question and its answer are left out")
    return {"messages": messages}, tuple(notes)


def _up(record: Json) -> Iterator[Mapping[str, Any]]:
    """The nodes from the current one up to the root; replaced answers are in other branches and left out."""
    mapping, at = record["mapping"], record["current_node"]
    seen: set[str] = set()
    while isinstance(at, str) and at not in seen and isinstance(mapping.get(at), dict):
        seen.add(at)
        yield mapping[at]
        at = mapping[at].get("parent")


def _said(entry: Json) -> list[Json]:
    """The node's message if it is text between the user and the model; none for tool messages and empty ones."""
    if _is_of_a_tool(entry) or not _is_text(entry):
        return []
    parts = entry["content"].get("parts")
    filled = [part for part in parts if not is_empty(part)] if isinstance(parts, list) else []
    typed = [{"type": part.get("content_type")} if isinstance(part, dict) else part for part in filled]
    return [{"role": _author(entry), "content": typed}] if typed else []


def _is_text(entry: Json) -> bool:
    return entry["content"].get("content_type") in ("text", "multimodal_text")


def _is_of_a_tool(entry: Json) -> bool:
    """Whether the message is from a tool or addressed to one."""
    return _author(entry) == "tool" or entry.get("recipient") not in (None, "all")


def _author(entry: Json) -> Any:
    author = entry.get("author")
    return author.get("role") if isinstance(author, dict) else None
