"""Table of the commands: what each does, an example, and its options."""

from typing import NamedTuple


class Option(NamedTuple):
    """An option of a command. Without a `value`, it is a switch."""

    name: str
    value: str
    about: str


class Command(NamedTuple):
    """A command. `keys`: it takes `--config.KEY=VALUE`. `words`: its arguments without a name."""

    module: str
    about: str
    example: str
    options: tuple[Option, ...]
    keys: bool = True
    words: str = ""


CONFIG_OPTION = Option("config", "FILE", "a config: .py, .yaml, or the config.json of a run")
WORKDIR_OPTION = Option("workdir", "DIR", "the run folder")
UNTRAINED = CONFIG_OPTION._replace(about="a config, for the untrained model")
STEP_OPTION = Option("step", "N", "the checkpoint of this step, by default the newest")
DEBUG = Option("debug", "", "show the traceback of an unexpected error")
HELP = Option("help", "", "show this text")

COMMANDS = {
    "train": Command(
        "jaxft.train",
        "Train or resume a run, and export it. The same command resumes a stopped run. So does"
        " --workdir alone. A longer total continues a finished one.",
        "jaxft train --config configs/llm.py --workdir runs/my --config.total=3_epochs",
        (
            CONFIG_OPTION,
            WORKDIR_OPTION._replace(about="the run folder, by default runs/CONFIG"),
        ),
    ),
    "evaluate": Command(
        "jaxft.evaluate",
        "Measure a checkpoint of a run, or an untrained model.",
        "jaxft evaluate --workdir runs/mine --config.data.eval=jsonl:test.jsonl",
        (
            WORKDIR_OPTION,
            STEP_OPTION,
            UNTRAINED,
        ),
    ),
    "sample": Command(
        "jaxft.sample",
        "Sample texts or pictures. Values divided by commas make a grid.",
        'jaxft sample --workdir runs/mine --prompt "Definition: a small bird"',
        (
            *(
                WORKDIR_OPTION,
                STEP_OPTION,
                UNTRAINED,
            ),
            Option("prompt", "TEXT", "the prompt"),
            Option("prompts", "FILE", "a file with one prompt a line"),
            Option("out", "DIR", "folder for pictures, by default samples/ of the run"),
            Option("copies", "N", "samples of each prompt"),
            Option("seed", "N", "seed of the samples"),
            Option("max_new", "N", "longest continuation, in tokens"),
            Option("temperature", "X", "0 is greedy"),
            Option("top_k", "N", "sample from the k likeliest tokens"),
            Option("top_p", "X", "sample from the likeliest tokens of this probability"),
            Option("steps", "N", "steps of the sampler of a diffusion model"),
            Option("guidance", "X", "guidance scale"),
            Option("image_guidance", "X", "guidance scale of the source picture"),
            Option("sampler", "NAME", "dpm++, euler or ddim"),
            Option("negative", "TEXT", "what a picture should not show"),
            Option("size", "WIDTHxHEIGHT", "size of a picture in pixels"),
            Option("seeds", "N-M", "one sample of each prompt for each seed"),
            Option("image", "FILE", "the picture to edit or to fill"),
            Option("mask", "FILE", "its white area is filled"),
            Option("raw", "", "continue the prompt as it is, without a chat template"),
        ),
    ),
    "predict": Command(
        "jaxft.predict",
        "Write the label and the scores of every text of a file by a trained classifier.",
        "jaxft predict --workdir runs/classify --data jsonl:texts.jsonl",
        (
            *(WORKDIR_OPTION, STEP_OPTION),
            Option("data", "SPEC", "the texts: a path or SCHEME:PLACE. Labels are not needed"),
            Option("out", "FILE", "by default predictions.jsonl of the run"),
        ),
    ),
    "report": Command(
        "jaxft.report",
        "Write report.html of a run folder again, from its files.",
        "jaxft report --workdir runs/mine",
        (WORKDIR_OPTION,),
        keys=False,
    ),
    "export": Command(
        "jaxft.export",
        "Export any checkpoint of a run, merged or as an adapter, in any dtype.",
        "jaxft export --workdir runs/llm --out adapter --kind adapter",
        (
            *(WORKDIR_OPTION, STEP_OPTION),
            Option("out", "DIR", "a new or an empty folder, by default export/ of the run"),
            Option("kind", "KIND", "what is written, by default export.kind of the run"),
            Option("dtype", "DTYPE", "source, float32, bfloat16 or float16"),
            Option("overwrite", "", "replace an earlier export in --out"),
        ),
    ),
    "plan": Command(
        "jaxft.plan",
        "Estimate memory and time of a run on any devices. Compiles its step for devices that need"
        " not be here. Reads neither weights nor data.",
        "jaxft plan --config configs/llm.py --topology h200:8",
        (
            CONFIG_OPTION,
            Option("topology", "NAME", "devices, such as here, cpu:8, h200:8 or v5e:4x4"),
            Option("search", "N", "compile up to N settings, and show the fastest that fits"),
            Option("json", "FILE", "also write the figures to a file"),
        ),
    ),
    "inspect-data": Command(
        "jaxft.inspect_data",
        "Show which tokens a language model will train. Reads no weights.",
        "jaxft inspect-data --config configs/llm.py --html data.html",
        (
            CONFIG_OPTION,
            Option("rows", "N", "examples to show, by default 3"),
            Option("html", "FILE", "also write a page"),
        ),
    ),
    "verify": Command(
        "jaxft.verify",
        "Compare a model folder with PyTorch, and write the certificate. Needs the extra"
        " jaxft[verify].",
        "jaxft verify runs/mine/export",
        (
            Option("out", "FILE", "the certificate, by default parity.json of the folder"),
            Option("long", "N", "first far position of a language model, by default 4096"),
        ),
        keys=False,
        words="DIR",
    ),
    "convert": Command(
        "jaxft.verify.convert",
        "Convert pickled weights to safetensors, once. Needs the extra jaxft[verify].",
        "jaxft convert path/to/pickles",
        (),
        keys=False,
        words="PATH [OUT]",
    ),
}
