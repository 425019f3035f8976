from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from cmkd_scale.data.processed import PAD_TOKEN, processed
from cmkd_scale.data.processors import Processor
from cmkd_scale.errors import UsageError
from cmkd_scale.models.backbone import BackboneEncoder, build_backbone
from cmkd_scale.models.backbone_spec import BackboneSpec, make_spec
from cmkd_scale.models.model import Model, build_model
from cmkd_scale.models.pretrained import pretrained_config, random_config
from tests.data.senses import MEMBERS
from tests.models.backbones import FAMILIES, save_backbone


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a family, written once."""
    root = tmp_path_factory.mktemp("hub")

    def find(name: str) -> Path:
        directory = root / name
        return directory if directory.exists() else save_backbone(name, directory)

    return find


def spec_of(directory: Path, name: str, **options: Any) -> BackboneSpec:
    modality = FAMILIES[name].modality
    processor = Processor(str(directory), modality)
    given = {
        "pooling": "auto",
        "padding": PAD_TOKEN if modality == "text" else None,
        "ragged": name in ("wav2vec2", "hubert"),
        "masked": processor.marks_padding(),
        **options,
    }
    return make_spec(pretrained_config(directory, modality, {}), pretrained=True, **given)


def inputs_of(directory: Path, name: str, count: int = 3) -> Tensor:
    modality = FAMILIES[name].modality
    reads = processed(Processor(str(directory), modality), {})
    extension, make = MEMBERS[modality]
    return torch.stack([reads.decode({extension: make(n % 3, n)}) for n in range(count)])


def encoder_of(directory: Path, name: str, **options: Any) -> BackboneEncoder:
    spec = spec_of(directory, name, **options)
    shape = tuple(inputs_of(directory, name, 1).shape[1:])
    return build_backbone(spec, shape, directory).eval()


def whole_model(directory: Path, name: str) -> Any:
    """What ``transformers`` opens by itself, without any of our configuration."""
    kind: Any = transformers.AutoModel
    if name == "byt5":
        kind = transformers.AutoModelForTextEncoding
    if name == "siglip":
        kind = transformers.SiglipVisionModel
    model = kind.from_pretrained(directory).eval()
    return model.encoder if name == "whisper" else model


@torch.no_grad()
def reference(directory: Path, name: str) -> Tensor:
    """Pooled outputs [3, W], one sample at a time, as each family's authors use it."""
    modality = FAMILIES[name].modality
    model = whole_model(directory, name)
    rows = []
    for number in range(3):
        _, make = MEMBERS[modality]
        content = make(number % 3, number)
        if modality == "text":
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
            given = tokenizer(content.decode(), return_tensors="pt")
            rows.append(model(**given).last_hidden_state.mean(1))
            continue
        given = {model.main_input_name: inputs_of(directory, name)[number : number + 1]}
        if name == "hubert":  # told of no padding, it is given none
            length = int(given["input_values"].count_nonzero())
            given = {"input_values": given["input_values"][:, :length]}
        output = model(**given)
        hidden = output.last_hidden_state
        if name in ("vit", "dinov2", "dinov3"):
            rows.append(hidden[:, 0])
        elif name in ("siglip", "ast"):
            rows.append(output.pooler_output)
        elif name in ("convnext", "resnet"):
            rows.append(hidden.mean((2, 3)))
        elif name == "wav2vec2":
            heard = int(given["input_values"].count_nonzero()) / given["input_values"].shape[1]
            rows.append(hidden[:, : int(heard * hidden.shape[1])].mean(1))
        else:
            rows.append(hidden.mean(1))
    return torch.cat(rows)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_pooled_outputs_are_those_of_the_library(name: str, hub: Callable[[str], Path]) -> None:
    directory = hub(name)
    encoder = encoder_of(directory, name)
    pooled, stages = encoder(inputs_of(directory, name))
    expected = reference(directory, name)
    assert pooled.shape == expected.shape == (3, encoder.out_dim)
    # The positional convolution of HuBERT sees the padding's zeros near the end.
    tolerance = 1e-3 if name == "hubert" else 1e-5
    torch.testing.assert_close(pooled, expected, rtol=0, atol=tolerance)
    assert (pooled[0] - pooled[1]).abs().max() > 10 * tolerance
    assert stages == ()


@pytest.mark.parametrize("name", FAMILIES)
def test_all_that_is_trained_has_a_part_in_the_output(
    name: str, hub: Callable[[str], Path]
) -> None:
    directory = hub(name)
    encoder = encoder_of(directory, name).train()
    encoder.keep_stages = True
    pooled, stages = encoder(inputs_of(directory, name, 2))
    pooled.square().sum().backward()
    for parameter_name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
    assert len(stages) >= 2
    assert len(encoder.blocks) >= 2
    assert all(stage.requires_grad for stage in stages)


@pytest.mark.parametrize("name", ["vit", "convnext", "resnet", "hubert", "bert", "byt5"])
def test_recomputed_blocks_give_the_same_gradient(name: str, hub: Callable[[str], Path]) -> None:
    directory = hub(name)
    inputs = inputs_of(directory, name, 2)
    gradients = []
    for recompute in (False, True):
        model = Model(encoder_of(directory, name).train(), encoder_dim=16, feature_dim=4, classes=2)
        with torch.no_grad():
            for part in (model.projection, model.head):
                for parameter in part.parameters():
                    torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        if recompute:
            model.checkpoint_activations()
        model(inputs).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "wav2vec2", "modernbert"])
def test_weights_follow_the_seed_alone(name: str, hub: Callable[[str], Path]) -> None:
    """Not what has been built before: a sample is passed through once for each kind of backbone."""
    directory = hub(name)
    shape = tuple(inputs_of(directory, name, 1).shape[1:])
    spec = spec_of(directory, name, tuning="lora", lora_rank=3)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        state = build_backbone(spec, shape, directory).state_dict()
        found.append({**state, "next": torch.rand(1)})
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_several_pictures_of_a_sample_are_averaged(hub: Callable[[str], Path]) -> None:
    encoder = encoder_of(hub("vit"), "vit")
    one = inputs_of(hub("vit"), "vit", 2)
    with torch.no_grad():
        both = encoder(one[None])[0][0]
        torch.testing.assert_close(both, encoder(one)[0].mean(0), rtol=0, atol=1e-6)


def test_padding_has_no_part_in_the_mean(hub: Callable[[str], Path]) -> None:
    directory = hub("bert")
    encoder = encoder_of(directory, "bert")
    tokens = inputs_of(directory, "bert", 1)
    with torch.no_grad():
        longer = torch.cat([tokens, torch.full_like(tokens, PAD_TOKEN)], dim=1)
        torch.testing.assert_close(encoder(longer)[0], encoder(tokens)[0], rtol=0, atol=1e-6)


def test_the_statistics_of_batch_norm_stay(hub: Callable[[str], Path]) -> None:
    directory = hub("resnet")
    encoder = encoder_of(directory, "resnet").train()
    inputs = inputs_of(directory, "resnet", 3)
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    together = encoder(inputs)[0]
    alone = torch.cat([encoder(row[None])[0] for row in inputs])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())


def test_nothing_is_drawn_while_training(hub: Callable[[str], Path]) -> None:
    for name in ("vit", "wav2vec2", "modernbert"):
        encoder = encoder_of(hub(name), name).train()
        inputs = inputs_of(hub(name), name, 2)
        assert torch.equal(encoder(inputs)[0], encoder(inputs)[0])


@pytest.mark.parametrize("name", ["vit", "wav2vec2", "byt5"])
def test_adapters_begin_as_nothing_and_are_all_that_learns(
    name: str, hub: Callable[[str], Path]
) -> None:
    directory = hub(name)
    inputs = inputs_of(directory, name, 2)
    plain = encoder_of(directory, name)
    adapted = encoder_of(directory, name, tuning="lora", lora_rank=2)
    with torch.no_grad():
        torch.testing.assert_close(adapted(inputs)[0], plain(inputs)[0], rtol=0, atol=1e-6)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    adapted(inputs)[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained.values())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
        changed = adapted(inputs)[0]
        assert (changed - plain(inputs)[0]).abs().max() > 1e-3
    stock = adapted.stock()
    assert stock is not None
    assert stock.state.keys() == plain.stock().state.keys()  # type: ignore[union-attr]


def test_a_frozen_backbone_has_no_gradient(hub: Callable[[str], Path]) -> None:
    encoder = encoder_of(hub("vit"), "vit", tuning="frozen")
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(inputs_of(hub("vit"), "vit", 1))[0].requires_grad


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_transformers_opens_what_an_export_would_hold(
    name: str, hub: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    directory = hub(name)
    encoder = encoder_of(directory, name, **({} if name == "resnet" else {"tuning": "lora"}))
    for parameter in encoder.parameters():
        parameter.mul_(1.1)
    stock = encoder.stock()
    assert stock is not None
    stock.config.save_pretrained(tmp_path)
    save_file(stock.state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened = getattr(transformers, stock.loader).from_pretrained(tmp_path).eval()
    backbone = getattr(opened, stock.attribute) if stock.attribute else opened
    inputs = inputs_of(directory, name, 2)
    arguments, _ = encoder._arguments(inputs)
    ours = encoder.backbone(**arguments).last_hidden_state
    torch.testing.assert_close(backbone(**arguments).last_hidden_state, ours, rtol=0, atol=1e-5)


def test_a_backbone_of_another_modality_is_refused(hub: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=r"reads audio, and the shards hold image"):
        pretrained_config(hub("ast"), "image", {})
    with pytest.raises(UsageError, match=r"reads text, and the shards hold audio"):
        pretrained_config(hub("bert"), "audio", {})


def test_unknown_options_name_the_nearest(hub: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=r"num_hiden_layers is no option.*num_hidden_layers"):
        pretrained_config(hub("vit"), "image", {"num_hiden_layers": 1})
    with pytest.raises(UsageError, match=r"'dinov22' is no family.*near it: dinov2"):
        random_config({"model_type": "dinov22"}, "image", (3, 32, 32))
    with pytest.raises(UsageError, match="has no model_type"):
        random_config({"hidden_size": 16}, "image", (3, 32, 32))


def test_weights_that_are_not_there_are_refused(hub: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "lacking"
    shutil.copytree(hub("vit"), directory)
    weights = load_file(directory / "model.safetensors")
    lost = next(name for name in weights if "attention" in name)
    del weights[lost]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="lack 1 of the backbone's"):
        encoder_of(directory, "vit")
    weights[lost] = torch.zeros(3)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lack 1 .*in other shapes .*bias"):
        encoder_of(directory, "vit")
    (directory / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UsageError, match="cannot be loaded"):
        encoder_of(directory, "vit")


def test_samples_that_do_not_fit_are_refused(hub: Callable[[str], Path]) -> None:
    spec = spec_of(hub("vit"), "vit")
    with pytest.raises(UsageError, match=r"cannot read samples of shape \[1, 32, 32\]"):
        build_backbone(spec, (1, 32, 32))
    with pytest.raises(UsageError, match="cannot read samples of shape"):
        build_backbone(spec_of(hub("convnext"), "convnext", pooling="cls"), (3, 16))


def test_texts_longer_than_the_table_of_positions_are_refused() -> None:
    """Before a text of that length comes; RoBERTa counts from behind the place of padding."""
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    for family, places in (("bert", 40), ("roberta", 38)):
        options = {"model_type": family, "max_position_embeddings": 40, "pad_token_id": 1, **small}
        config = random_config(options, "text", (16,))
        spec = make_spec(config, pretrained=False, pooling="auto", padding=0)
        build_backbone(spec, (places,))
        with pytest.raises(UsageError, match=rf"knows {places} positions.*up to {places + 1} tok"):
            build_backbone(spec, (places + 1,))


def test_a_pooling_that_a_family_lacks_is_refused(hub: Callable[[str], Path]) -> None:
    for name in ("modernbert", "hubert"):
        with pytest.raises(UsageError, match="has no pooling of its own; choose cls or mean"):
            encoder_of(hub(name), name, pooling="pooled")


def test_code_beside_a_model_is_not_run_even_if_somebody_says_yes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    with pytest.raises(UsageError, match="transformers refuses the configuration"):
        pretrained_config(tmp_path, "image", {})
    assert not (tmp_path / "was run").exists()


def test_recomputed_blocks_of_a_family_that_generates_see_no_cache() -> None:
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = random_config({"model_type": "llama", **small}, "text", (12,))
    spec = make_spec(config, pretrained=False, pooling="auto", padding=0)
    encoder = build_backbone(spec, (12,)).train()
    model = Model(encoder, encoder_dim=16, feature_dim=4, classes=2)
    inputs = torch.randint(1, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    inputs[1, 8:] = 0  # padding: a mask of 12 places
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.checkpoint_activations()
        model.zero_grad()
        model(inputs).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_adapters_want_linear_layers(hub: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="finds no layer to adapt in ResNetModel"):
        encoder_of(hub("resnet"), "resnet", tuning="lora")


@pytest.mark.parametrize(
    ("options", "modality", "shape"),
    [
        (
            {"model_type": "vit", "hidden_size": 16, "num_attention_heads": 2, "patch_size": 8},
            "audio",
            (1, 40, 64),
        ),
        (
            {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8},
            "audio",
            (1, 40, 64),
        ),
        (
            {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8},
            "image",
            (3, 48, 40),
        ),
        (
            {
                "model_type": "audio-spectrogram-transformer",
                "hidden_size": 16,
                "num_attention_heads": 2,
            },
            "audio",
            (1, 40, 64),
        ),
        ({"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2}, "text", (32,)),
        (
            {"model_type": "modernbert", "hidden_size": 16, "num_attention_heads": 2},
            "text",
            (32,),
        ),
    ],
)
def test_random_backbones_take_the_sizes_of_the_samples(
    options: dict[str, Any], modality: str, shape: tuple[int, ...]
) -> None:
    layers = {} if options["model_type"] == "resnet" else {"num_hidden_layers": 1}
    small: dict[str, Any] = layers or {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 16]}
    config = random_config({**options, **small}, modality, shape)
    padding = 0 if modality == "text" else None
    model = build_model(
        encoder=None,
        shape=shape,
        width=16,
        depth=1,
        feature_dim=8,
        classes=5,
        backbone=make_spec(config, pretrained=False, pooling="auto", padding=padding),
    ).train()
    kind = torch.int64 if modality == "text" else torch.float32
    inputs = torch.ones(2, *shape, dtype=kind)
    assert model(inputs).logits.shape == (2, 5)
    model(inputs).logits.sum().backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


def test_raw_sound_is_not_what_the_built_in_modality_gives() -> None:
    config = random_config({"model_type": "wav2vec2", "num_hidden_layers": 1}, "audio", (1, 40, 64))
    with pytest.raises(UsageError, match="cannot read samples of shape"):
        build_backbone(make_spec(config, pretrained=False, pooling="auto"), (1, 40, 64))


def test_a_spec_survives_json(hub: Callable[[str], Path]) -> None:
    spec = spec_of(hub("siglip"), "siglip", tuning="lora", lora_targets=("q_proj", "v_proj"))
    assert BackboneSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_building_says_nothing_and_leaves_deepspeed_alone() -> None:
    """Results are JSON on stdout, and DeepSpeed talks there when it is imported."""
    program = """
import sys
from cmkd_scale.models.backbone import build_backbone
from cmkd_scale.models.backbone_spec import make_spec
from cmkd_scale.models.pretrained import random_config
small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
config = random_config({"model_type": "vit", **small}, "image", (3, 32, 32))
spec = make_spec(config, pretrained=False, pooling="auto", tuning="lora")
build_backbone(spec, (3, 32, 32))
sys.exit("deepspeed" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
