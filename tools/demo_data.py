"""Emoji with captions and the small CLIP tokenizer of the demo, from npm and PyPI packages."""

import colorsys
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SEED = 0
SIZE = 64  # pixels on a side, as the packages hold them
PACKAGES = {  # file name -> sha256
    "emoji-datasource-google-16.0.0.tgz": (
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
    ),
    "emoji-datasource-twitter-16.0.0.tgz": (
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
    ),
    "iconify-json-fluent-emoji-flat-1.2.6.tgz": (
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
    "emojilib-4.0.3.tgz": "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
    "clip_anytorch-2.6.0-py3-none-any.whl": (
        "ebc0afed243851b9dc7e16ab8afb665237e8a5838986e97cd99f123ae4ce94ce"
    ),
}

# The fine-tuning set: drawings of things and faces, so no flags, swatches, arrows, buttons and
# letters, nor people, who look alike at this size; as many as two CPU cores can learn to draw.
SHOWN = {"valid": 64, "train": 192}
LEFT_OUT = {"Flags", "Component", "Symbols", "People & Body"}


class World(NamedTuple):
    """Pictures of each emoji, the least side of one as a share of the page, white pages' share.

    Each picture stands in the set once for each of the captions, in which {} is its name.
    """

    copies: int
    smallest: float
    white: float
    captions: tuple[str, ...] = ("{}",)


PAGES = World(12, 1.0, 0.25)  # what the demo pipeline learns from
# What the demo image-token model learns one after another; the last three are of both styles.
PLACES, STYLES, STILL = World(6, 0.85, 1.0), World(4, 0.85, 1.0), World(1, 1.0, 1.0)
WORDINGS = (
    *("{}", "a picture of {}", "{} emoji", "small {}", "drawing of {}", "an image of {}"),
    *("photo of {}", "{} icon", "the {}", "one {}", "clip art of {}", "this is {}"),
)
SAID = STILL._replace(captions=WORDINGS)
STICKER = "sticker of {}"  # none of them: what fine-tuning that model teaches

VOCABULARY = 4096
MODEL_MAX_LENGTH = 24  # the longest caption of both styles has 17 tokens with start and end
START, END = "<|startoftext|>", "<|endoftext|>"


class Emoji(NamedTuple):
    """One drawing and its words; `unified` are its code points in hex, joined by dashes."""

    unified: str
    category: str
    subcategory: str
    text: str
    keywords: list[str]
    image_name: str
    png: bytes


def fetch(file_name: str, folder: Path) -> Path:
    """The package file in `folder`, downloaded by its registry's own client if it is not there."""
    path = folder / file_name
    if not path.exists():
        name, version = file_name.removesuffix(".tgz").split("-py3-")[0].rsplit("-", 1)
        name = name.replace("iconify-json-", "@iconify-json/")
        if file_name.endswith(".tgz"):
            command = ["npm", "pack", "--silent", f"{name}@{version}"]
        else:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
            command += ["--only-binary=:all:", f"{name}=={version}"]
        subprocess.run(command, cwd=folder, check=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != PACKAGES[file_name]:
        raise ValueError(f"{path} has sha256 {found}, expected {PACKAGES[file_name]}: delete it")
    return path


def tar_files(path: Path, prefix: str) -> dict[str, bytes]:
    """The files of a .tgz whose names start with `prefix`, read without unpacking to disk."""
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.name.startswith(prefix) else None
            if stream is not None:  # None for folders
                found[member.name.removeprefix(prefix)] = stream.read()
    return found


def emoji_of(style: str, packages: Path) -> list[Emoji]:
    """Every emoji of a style ("google", "twitter") in the package's order, skin tones left out."""
    package = fetch(f"emoji-datasource-{style}-16.0.0.tgz", packages)
    images = tar_files(package, f"package/img/{style}/{SIZE}/")
    entries = json.loads(tar_files(package, "package/emoji.json")[""])
    words_file = "package/dist/emoji-en-US.json"
    words = json.loads(tar_files(fetch("emojilib-4.0.3.tgz", packages), words_file)[""])
    found = []
    for entry in entries:
        text, keywords = caption(entry, words)
        png = images[entry["image"]]
        kind = entry["category"], entry["subcategory"]
        found.append(Emoji(entry["unified"], *kind, text, keywords, entry["image"], png))
    return found


def caption(entry: dict, words: dict[str, list[str]]) -> tuple[str, list[str]]:
    """Caption and keywords: emojilib's natural name where it has one, else the Unicode name."""
    names: list[str] = []
    for code_points in (entry["unified"], entry["non_qualified"]):
        if code_points and not names:
            names = words.get("".join(chr(int(c, 16)) for c in code_points.split("-")), [])
    text = names[0] if names else ""
    if not text or text.startswith("keycap"):  # "keycap:_*" and its like read badly
        text = entry["name"].lower() or entry["short_name"].replace("-", " ")
    return text.replace("_", " "), [word.replace("_", " ") for word in names[1:]]


def on_white(png: bytes) -> Image.Image:
    """An RGB image of SIZE x SIZE, its transparency laid on white."""
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    if drawing.size != (SIZE, SIZE):
        raise ValueError(f"an emoji of {drawing.size} pixels, expected {(SIZE, SIZE)}")
    page = Image.new("RGBA", drawing.size, "white")
    page.alpha_composite(drawing)
    return page.convert("RGB")


def save_small(image: Image.Image, path: Path) -> None:
    """An RGB image as PNG, without loss: with a palette where 256 colours are enough."""
    flat = np.asarray(image).reshape(-1, 3)
    colours, index = np.unique(flat, axis=0, return_inverse=True)
    if len(colours) <= 256:
        image = Image.fromarray(index.reshape(image.size[::-1]).astype(np.uint8), mode="P")
        image.putpalette(colours.tobytes())
    image.save(path, optimize=True)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_bytes("".join(lines).encode())


def write_google(packages: Path, out: Path) -> None:
    """What the demo weights learn: all 1,911 emoji, a tenth for validation; and those placed."""
    rows: dict[str, list[dict]] = {"train": [], "valid": []}
    everything = emoji_of("google", packages)
    for emoji in everything:
        bucket = int(hashlib.md5(emoji.unified.encode()).hexdigest(), 16) % 10
        split = "valid" if bucket == 0 else "train"
        name = f"{len(rows[split]):04d}.png"
        row = {"file_name": name, "text": emoji.text, "category": emoji.subcategory}
        rows[split].append(row | {"keywords": emoji.keywords, "unicode": emoji.unified})
        (out / split).mkdir(parents=True, exist_ok=True)
        on_white(emoji.png).save(out / split / name)
    for split, picked in rows.items():
        write_jsonl(out / split / "metadata.jsonl", picked)
    shown = [emoji for _, picked in shown_splits(everything) for emoji in picked]
    shown.sort(key=everything.index)
    write_placed(shown, out / "pages", PAGES)
    write_placed(shown, out / "places", PLACES)
    both = [*shown, *drawn_flat(shown, packages)]
    write_placed(both, out / "styles", STYLES)
    write_placed(both, out / "still", STILL)
    write_placed(both, out / "said", SAID)


def is_shown(emoji: Emoji) -> bool:
    """Drawings of one code point: joined ones are mostly the same person in another role."""
    joined = "-" in emoji.unified.removesuffix("-FE0F")
    return emoji.category not in LEFT_OUT and not joined


def shown_splits(everything: list[Emoji]) -> Iterator[tuple[str, list[Emoji]]]:
    """The splits of the fine-tuning set: the first by hash of the emoji, in the package's order."""
    candidates = [emoji for emoji in everything if is_shown(emoji)]
    ranks = [hashlib.md5(f"{SEED} {emoji.unified}".encode()).hexdigest() for emoji in candidates]
    order = sorted(range(len(candidates)), key=ranks.__getitem__)
    for split, count in SHOWN.items():
        yield split, [candidates[i] for i in sorted(order[:count])]
        order = order[count:]


def drawn_flat(shown: list[Emoji], packages: Path) -> list[Emoji]:
    """The same emoji as Microsoft draws them, in its Fluent flat style; needs resvg-py."""
    from resvg_py import svg_to_bytes

    files = tar_files(fetch("iconify-json-fluent-emoji-flat-1.2.6.tgz", packages), "package/")
    names, icons = (json.loads(files[name]) for name in ("chars.json", "icons.json"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="{SIZE}">'
    made = []
    for emoji in shown:
        body = icons["icons"][names[emoji.unified.lower().removesuffix("-fe0f")]]["body"]
        png = bytes(svg_to_bytes(svg_string=f"{head}{body}</svg>"))
        made.append(emoji._replace(png=png, image_name=f"flat-{emoji.image_name}"))
    return made


def write_placed(drawings: list[Emoji], out: Path, world: World) -> None:
    """The emoji that ship, as others draw them, on pages of other colours or in other places.

    So a model knows what a heart looks like, but not how its user wants it: that, fine-tuning adds.
    """
    rng, rows = np.random.default_rng(SEED), []
    out.mkdir(parents=True, exist_ok=True)
    for emoji in drawings:
        for copy in range(world.copies):
            name = f"{Path(emoji.image_name).stem}-{copy}.png"
            placed(emoji.png, world, rng).save(out / name)
            texts = [caption.format(emoji.text) for caption in world.captions]
            rows += [{"file_name": name, "text": text} for text in texts]
    write_jsonl(out / "metadata.jsonl", rows)


def placed(png: bytes, world: World, rng: np.random.Generator) -> Image.Image:
    """A drawing somewhere on a page of a random or white colour."""
    hue, saturation, value = rng.uniform((0, 0.15, 0.8), (1, 0.5, 1))
    coloured = rng.random() > world.white
    colour = colorsys.hsv_to_rgb(hue, saturation, value) if coloured else (1, 1, 1)
    side = int(rng.integers(round(world.smallest * SIZE), SIZE, endpoint=True))
    left, top = (int(x) for x in rng.integers(0, SIZE - side, 2, endpoint=True))
    page = Image.new("RGBA", (SIZE, SIZE), tuple(round(255 * x) for x in colour))
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    page.alpha_composite(drawing.resize((side, side), Image.Resampling.LANCZOS), (left, top))
    return page.convert("RGB")


def write_emoji(packages: Path, out: Path) -> None:
    """The pictures that ship for fine-tuning: Twitter's drawings under their own file names."""
    write_shown("twitter", "{}", packages, out)


def write_stickers(packages: Path, out: Path) -> None:
    """The same emoji as Google draws them, in words that the demo image-token model has not met."""
    write_shown("google", STICKER, packages, out)


def write_shown(style: str, wording: str, packages: Path, out: Path) -> None:
    """One style's drawings of the emoji that ship, in their two splits."""
    for split, picked in shown_splits(emoji_of(style, packages)):
        (out / split).mkdir(parents=True, exist_ok=True)
        for emoji in picked:
            save_small(on_white(emoji.png), out / split / emoji.image_name)
        texts = {emoji.image_name: wording.format(emoji.text) for emoji in picked}
        rows = [{"file_name": name, "text": text} for name, text in texts.items()]
        write_jsonl(out / split / "metadata.jsonl", rows)


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in CLIP's BPE, in the order of its ids.

    Printable bytes of Latin-1 stand for themselves and come first; the others follow as the code
    points from 256 on (GPT-2's byte-level alphabet).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def clip_vocabulary(merges: list[str]) -> dict[str, int]:
    """Token -> id: bytes, bytes that end a word, the merges in order, the two special tokens."""
    letters = byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += [merge.replace(" ", "") for merge in merges] + [START, END]
    return {token: i for i, token in enumerate(tokens)}


def write_tokenizer(packages: Path, out: Path) -> None:
    """CLIP's BPE cut to VOCABULARY entries, in the folder layout of transformers 4 and 5."""
    wheel = fetch("clip_anytorch-2.6.0-py3-none-any.whl", packages)
    with zipfile.ZipFile(wheel) as files:
        lines = gzip.decompress(files.read("clip/bpe_simple_vocab_16e6.txt.gz")).decode()
    merges = lines.split("\n")[1 : 1 + VOCABULARY - 2 * 256 - 2]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MODEL_MAX_LENGTH, **special}
    out.mkdir(parents=True, exist_ok=True)
    (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    vocabulary = json.dumps(clip_vocabulary(merges), ensure_ascii=False, separators=(",", ":"))
    (out / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    (out / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
