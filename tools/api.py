"""Write docs/api.md, the page of `import jaxft`, from the docstrings of what it returns.

`python tools/api.py` writes the page. tests/api/test_page.py compares it.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import jaxft
from jaxft.api import finetuning, loading

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
FUNCTIONS = (jaxft.load, jaxft.finetune)
CLASSES = (
    finetuning.Finetuned,
    loading.LoadedDecoder,
    loading.LoadedPipeline,
    loading.LoadedImageTokens,
    loading.LoadedAutoencoder,
    loading.LoadedNetwork,
)
HEAD = """# jaxft in Python

`python tools/api.py` writes this page from the docstrings. The notebooks use all of it:
[a language model](examples/language_model.ipynb), [a LoRA of Stable
Diffusion](examples/diffusion_lora.ipynb), [image tokens](examples/image_tokens.ipynb) and [a loss
of your own](examples/own_loss.ipynb). The package has types (`py.typed`), and importing it touches
no device. An error of a user's input is `jaxft.core.errors.UserError`, whose text is one line.
"""


def page() -> str:
    """Return the text of docs/api.md."""
    parts = [HEAD]
    parts += [_entry("##", f"jaxft.{one.__name__}", one) for one in FUNCTIONS]
    for cls in CLASSES:
        fields = [name for name in getattr(cls, "__annotations__", {}) if name != "source"]
        holds = ", ".join(f"`{name}`" for name in fields)
        parts.append(f"## {cls.__name__}\n\n{_prose(cls)}\n\nIt holds {holds}.\n")
        for name, member in vars(cls).items():
            shown = name == "__call__" or not name.startswith("_")
            if shown and (inspect.isfunction(member) or _is_property(member)):
                parts.append(_entry("###", "call" if name == "__call__" else name, member))
    return "\n".join(parts)


def _is_property(member: Any) -> bool:
    return isinstance(member, property) or hasattr(member, "attrname")


def _entry(level: str, title: str, member: Any) -> str:
    if _is_property(member):
        return f"{level} {title}\n\n{_prose(member)}\n"
    given = [one for one in inspect.signature(member).parameters.values() if one.name != "self"]
    names = [_argument(one) for one in given]
    by_name = [i for i, one in enumerate(given) if one.kind is one.KEYWORD_ONLY]
    if by_name:
        names.insert(by_name[0], "*")
    name = title if title != "call" else "model"
    return f"{level} {title}\n\n```python\n{name}({', '.join(names)})\n```\n\n{_prose(member)}\n"


def _argument(one: inspect.Parameter) -> str:
    default = json.dumps(one.default) if isinstance(one.default, str) else repr(one.default)
    return one.name if one.default is one.empty else f"{one.name}={default}"


def _prose(member: Any) -> str:
    """Return a docstring as Markdown, one line a paragraph."""
    paragraphs = re.split(r"\n\n", inspect.getdoc(member) or "")
    return "\n\n".join(" ".join(text.split()) for text in paragraphs)


def main() -> None:
    PAGE.write_text(page())
    print(PAGE)


if __name__ == "__main__":
    main()
