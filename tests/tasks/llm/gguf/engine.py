"""GGUF exports of untrained models, and three readers of them: gguf, transformers, llama.cpp."""

import gguf
import jax
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM

from jaxft.export import export_folder
from tests import whole as runs

KIND = gguf.GGMLQuantizationType


def exported(make_config, folder, out, kind="gguf", dtype="source", **changes):
    """The GGUF of an untrained model."""
    run = runs.open_run(make_config(folder, {"lora.rank": 0, "trainable": ".*", **changes}))
    with jax.set_mesh(run.mesh):
        export_folder(run, runs.load_params(run), out, kind, dtype)
    (file,) = out.glob("*.gguf")
    return file


def read(file):
    """All tensors and their types by the names of llama.cpp, as the gguf package decodes them."""
    tensors = gguf.GGUFReader(file).tensors
    arrays = {t.name: dequantize(t.data, t.tensor_type) for t in tensors}
    shaped = {t.name: arrays[t.name].reshape(t.shape[::-1]) for t in tensors}
    return shaped, {t.name: KIND(t.tensor_type) for t in tensors}


def logits(place, file=None, config=None):
    tokens = torch.arange(3, 60)[None]
    where = {"gguf_file": file.name} if file else {}
    where |= {"config": config} if config else {}
    settings = {"dtype": torch.float32, "attn_implementation": "eager", **where}
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(place, **settings)(tokens).logits.numpy()


class Engine:
    """llama.cpp with one file, through the wheel of cyllama."""

    def __init__(self, file, length=256):
        cpp = pytest.importorskip("cyllama.llama.llama_cpp", reason="pip install --no-deps cyllama")
        cpp.disable_logging()
        cpp.ggml_backend_load_all()
        self.cpp, settings = cpp, cpp.LlamaContextParams()
        settings.n_ctx, settings.n_batch, self.length = length, length, length

        class Model(cpp.LlamaModel):
            @property
            def n_vocab(self):  # which the wheel's own get_logits_ith asks for
                return self.get_vocab().n_vocab

        self.model = Model(str(file), cpp.LlamaModelParams())
        self.context, self.vocab = cpp.LlamaContext(self.model, settings), self.model.get_vocab()

    def logprobs(self, tokens):
        batch = self.cpp.LlamaBatch(n_tokens=self.length, embd=0, n_seq_max=1)
        for i, token in enumerate(tokens):
            batch.add(int(token), i, [0], True)
        self.context.decode(batch)
        rows = [self.context.get_logits_ith(i) for i in range(len(tokens))]
        return np.asarray(jax.nn.log_softmax(np.array(rows)))
