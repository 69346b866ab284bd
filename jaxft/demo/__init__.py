"""Small real data and small weights that ship with jaxft, by name. NOTICE.md has the licences."""

from pathlib import Path

from jaxft.core.errors import UserError

FOLDER = Path(__file__).resolve().parent
DEMOS = {  # by the config key that may name them as "demo:NAME"
    "model": ("emoji-sd", "emoji-tokens"),
    "perceptual": ("efficientnet-lite0",),
    "texts": (
        *("supersense/train.jsonl", "supersense/valid.jsonl"),
        *("novel/train.txt", "novel/valid.txt"),
    ),
    "images": ("emoji/train", "emoji/valid", "stickers/train", "stickers/valid"),
}


def demo_path(spec: str, kind: str) -> Path | None:
    """Return the path of `demo:NAME`, or None for a spec of another scheme.

    A name is an entry of DEMOS without its suffix. Raises UserError for a name that `kind` lacks.
    """
    if not spec.startswith("demo:"):
        return None
    name = spec.removeprefix("demo:")
    places = {place.partition(".")[0]: place for place in DEMOS[kind]}
    if name not in places:
        names = ", ".join(f"demo:{known}" for known in places)
        raise UserError(f"unknown demo {kind} {spec!r}: expected one of {names}")
    return FOLDER / places[name]
