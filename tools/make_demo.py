"""Rebuild jaxft/demo byte for byte from public packages.

    python tools/make_demo.py [--root DIR] [--out jaxft/demo]

Without --root it runs `apt-get download` and `dpkg-deb -x` (no root rights needed) for the Debian
packages wordnet-base and r-cran-janeaustenr; with --root it reads a folder they are unpacked in.
"""

import argparse
import hashlib
import json
import random
import subprocess
import tempfile
import zlib
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder with the unpacked Debian packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "jaxft/demo")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = args.root or Path(scratch)
        if args.root is None:
            unpack_debian(root)
        write_supersense(root, args.out / "supersense")
        write_novel(root, args.out / "novel")


if __name__ == "__main__":
    main()
