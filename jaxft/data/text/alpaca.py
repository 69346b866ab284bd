"""Prompts of the fields `instruction` and `input`, as Stanford Alpaca wrote them.

Source: tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT.
"""

_TASK = "Below is an instruction that describes a task"
_ORDER = "Write a response that appropriately completes the request."


def alpaca_prompt(instruction: str, context: str) -> str:
    """Return the prompt for a model without a chat template. `context` may be ""."""
    if not context:
        return f"{_TASK}. {_ORDER}\n\n### Instruction:\n{instruction}\n\n### Response:"
    return (
        f"{_TASK}, paired with an input that provides further context. {_ORDER}\n\n"
        f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:"
    )


def alpaca_request(instruction: str, context: str) -> str:
    """Return the user's turn for a model with a chat template. `context` may be ""."""
    return f"{instruction}\n\n{context}" if context else instruction
