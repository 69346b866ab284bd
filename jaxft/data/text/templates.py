"""Fields of a text record, and their prompt and completion."""

from typing import Any

from jaxft.core.errors import UserError
from jaxft.data.text.alpaca import alpaca_prompt

ALPACA = ("instruction", "output")  # and perhaps "input"; the sets have a rendered "text" too
RECORD_KINDS = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ALPACA,
    ("text", "label"),
    ("text",),
)


def record_kind(record: dict[str, Any], where: str) -> tuple[str, ...]:
    """Return the first of RECORD_KINDS whose fields a record has. Raises UserError for none."""
    for kind in RECORD_KINDS:
        if all(field in record for field in kind):
            return kind
    found = ", ".join(map(repr, record)) or "none"
    if "chosen" in record:
        raise UserError(f"{where}: found the fields {found}; for preferences set objective=dpo")
    raise UserError(
        f'{where}: found the fields {found}; expected "messages", or "text", or "prompt" and '
        '"completion", or "instruction" and "output", or "text" and "label"; '
        "--config.columns=prompt=FIELD renames"
    )


def render(
    record: dict[str, Any], kind: tuple[str, ...], template: str | None, where: str
) -> tuple[str, str]:
    """Return the (prompt, completion) of a record. A plain text has an empty prompt."""
    values = [text_field(record, field, where) for field in kind]
    if kind == ("text",):
        return "", values[0]
    if kind == ("prompt", "completion"):
        return values[0], values[1]
    if kind == ALPACA:
        context = "" if record.get("input") is None else text_field(record, "input", where)
        return alpaca_prompt(values[0], context), values[1]
    head, lead, tail = split_template(template)
    return head.replace("{text}", values[0]), lead + values[1] + tail


def text_field(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise UserError(f"{where}: field {field!r} is missing; the records before it have it")
    return check_text(record[field], field, where)


def check_text(value: Any, field: str, where: str) -> str:
    """Return a value that is a string of whole characters. Raises UserError for another one."""
    if not isinstance(value, str):
        raise UserError(
            f"{where}: field {field!r} must be a string, found {type(value).__name__} "
            f"{str(value)[:40]!r}"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: field {field!r} has a lone surrogate at character {error.start}: "
                "write the character itself or its full pair"
            ) from None
    return value


def split_template(template: str | None) -> tuple[str, str, str]:
    """Return a template as (prompt, whitespace before the label, text after the label).

    The whitespace belongs to the completion, because tokenizers join it to the label's first word.
    Raises UserError unless {text} and then {label} are in the template once each.
    """
    template = template or ""
    head, _, tail = template.partition("{label}")
    if template.count("{label}") != 1 or head.count("{text}") != 1 or "{text}" in tail:
        raise UserError(
            f"template {template!r} must hold {{text}} once and after it {{label}} once, "
            "such as 'Definition: {text}\\nCategory: {label}'"
        )
    prompt = head.rstrip()
    return prompt, head[len(prompt) :], tail
