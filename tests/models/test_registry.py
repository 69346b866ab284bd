"""The table of architectures: every entry opens, errors name the nearest, packages add to it."""

import pytest

from jaxft.core.errors import UserError
from jaxft.models import registry

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral3": "Mistral3ForConditionalGeneration",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "janus": "JanusForConditionalGeneration",
    "multi_modality": "JanusForConditionalGeneration",
    "AutoencoderKL": "AutoencoderKL",
    "VQModel": "VQModel",
    "janus_vqgan": "JanusVQVAE",
    "UNet2DConditionModel": "UNet2DConditionModel",
    "SD3Transformer2DModel": "SD3Transformer2DModel",
    "FluxTransformer2DModel": "FluxTransformer2DModel",
    "Flux2Transformer2DModel": "Flux2Transformer2DModel",
    "ZImageTransformer2DModel": "ZImageTransformer2DModel",
    "clip_text_model": "CLIPTextModel",
    "clip": "CLIPTextModel",
    "t5": "T5EncoderModel",
}


def named(name):
    return {"_class_name" if name[0].isupper() else "model_type": name}


def test_the_table_has_no_other_names():
    assert {name for names in registry.MODEL_TYPES.values() for name in names} == CLASSES.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_every_name_has_its_code(name):
    family = registry.find_family(named(name))
    found = registry.find(named(name), family)
    assert (found.family, found.class_name(named(name))) == (family, CLASSES[name])


def test_a_mistral_of_listed_layers_is_another_class():
    config = {"model_type": "mistral", "layer_types": None}
    assert registry.find(config, "decoder").class_name(config) == "MinistralForCausalLM"


def test_an_unknown_type_names_at_most_ten_and_the_nearest_first(monkeypatch):
    more = {f"other{i}": "x:Y" for i in range(30)} | {"gemma2": "x:Y", "gemma3_text": "x:Y"}
    table = {**registry.MODEL_TYPES, "decoder": registry.MODEL_TYPES["decoder"] | more}
    monkeypatch.setattr(registry, "MODEL_TYPES", table)
    with pytest.raises(UserError, match=r"^here: model_type='gemma3_' is not supported") as caught:
        registry.find({"model_type": "gemma3_"}, "decoder", "here")
    shown = str(caught.value).partition("supported are ")[2].partition(":")[0].split(", ")
    assert len(shown) == 10 and set(shown[:3]) == {"gemma2", "gemma3", "gemma3_text"}
    assert "give a model of one of these" in str(caught.value)


def test_a_package_adds_a_decoder_but_replaces_none(tmp_path, monkeypatch):
    about = tmp_path / "more-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: more\nVersion: 1\n")
    lines = [
        f"{name} = jaxft.models.decoders.families.qwen:ARCHITECTURE" for name in ("mine", "llama")
    ]
    (about / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    from jaxft.models.decoders.families import llama, qwen

    assert registry.find({"model_type": "mine"}, "decoder") is qwen.ARCHITECTURE
    assert registry.find({"model_type": "llama"}, "decoder") is llama.ARCHITECTURE
    with pytest.raises(UserError, match=r"model_type='mines'.* mine, "):
        registry.find({"model_type": "mines"}, "decoder")


def test_a_type_that_is_no_name_is_refused_too():
    for config in ({"model_type": ["llama"]}, {"model_type": {}}, {}):
        assert registry.find_family(config) is None
        with pytest.raises(UserError, match=r"model_type=.* is not supported"):
            registry.find(config, "decoder")
