"""Checkpoints: what is written comes back, nothing else does, and a file is whole or not there."""

import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import draw_parameters, tiny_denoiser, tiny_images, tiny_unet

from ddpm_lib import (
    CheckpointError,
    Denoiser,
    Schedule,
    Trainer,
    checkpoint,
    load_denoiser,
    pretrained,
    save_denoiser,
)
from ddpm_lib.checkpoint import read_checkpoint, shipped, write_checkpoint


@pytest.fixture
def path(tmp_path):
    """A small whole checkpoint."""
    save_denoiser(tiny_denoiser(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "score"])
@pytest.mark.parametrize("schedule", [Schedule.linear(30), Schedule.cosine(7, 0.1), Schedule([0.1, 0.3])], ids=repr)
def test_a_denoiser_comes_back_as_it_was(tmp_path, schedule, predicts):
    denoiser = tiny_denoiser(schedule, predicts, classes=3, dropout=0.25)
    save_denoiser(denoiser, tmp_path / "new" / "folder" / "model.safetensors")
    again = load_denoiser(tmp_path / "new" / "folder" / "model.safetensors")
    assert not again.training
    assert again.predicts == predicts
    assert again.network.config == denoiser.network.config
    assert torch.equal(again.schedule.alpha_bar, schedule.alpha_bar)
    x, t, label = torch.randn(3, 1, 4, 4), torch.tensor([1, 2, 2]), torch.tensor([0, 2, 3])
    assert torch.equal(again(x, t, label).x0, denoiser.eval()(x, t, label).x0)


def test_double_and_half_precision_weights_come_back(tmp_path):
    for dtype in (torch.float64, torch.bfloat16):
        tensors = {"a": torch.randn(2, 3).to(dtype), "b": torch.arange(4), "c": torch.tensor(2.5, dtype=dtype)}
        write_checkpoint(tmp_path / "x.safetensors", "test", {"n": 1}, tensors)
        config, found = read_checkpoint(tmp_path / "x.safetensors", "test")
        assert config == {"n": 1}
        assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())


def test_stored_in_half_precision_a_denoiser_takes_half_the_space_and_rounds_once(tmp_path):
    denoiser = tiny_denoiser(base_channels=16)
    save_denoiser(denoiser, tmp_path / "whole.safetensors")
    save_denoiser(denoiser, tmp_path / "half.safetensors", bits=16)
    again = load_denoiser(tmp_path / "half.safetensors")
    sizes = [(tmp_path / name).stat().st_size for name in ("whole.safetensors", "half.safetensors")]
    saved = sum(p.numel() for p in denoiser.parameters()) * 2
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.01)
    for before, after in zip(denoiser.parameters(), again.parameters()):
        assert after.dtype == torch.float32
        assert ((after - before).abs() <= before.abs() / 2048 + 2.0**-25).all()


def test_weights_too_large_for_half_precision_are_refused(tmp_path):
    denoiser = tiny_denoiser()
    with torch.no_grad():
        denoiser.network.head.bias[0] = 1e5
    with pytest.raises(ValueError, match="float16"):
        save_denoiser(denoiser, tmp_path / "x.safetensors", bits=16)
    assert not list(tmp_path.iterdir())


def test_stored_in_8_bits_each_output_of_a_denoiser_has_a_scale_of_its_own(tmp_path):
    denoiser = tiny_denoiser(base_channels=16, heads=2)
    with torch.no_grad():
        denoiser.network.stem.weight *= torch.logspace(-6, 3, 16).view(-1, 1, 1, 1)  # no scale would serve all
        denoiser.network.stem.weight[3] = 0.0
        denoiser.network.stem.weight[4] *= 1e-40 / denoiser.network.stem.weight[4].abs().max()
    save_denoiser(denoiser, tmp_path / "whole.safetensors")
    save_denoiser(denoiser, tmp_path / "eight.safetensors", bits=8)
    again = load_denoiser(tmp_path / "eight.safetensors")
    sizes = [(tmp_path / name).stat().st_size for name in ("whole.safetensors", "eight.safetensors")]
    assert sizes[1] < 0.35 * sizes[0]  # of a large network, a quarter
    for before, after in zip(denoiser.parameters(), again.parameters()):
        assert after.dtype == torch.float32
        if before.ndim > 1:
            rounded, largest = (after - before).flatten(1).abs(), before.flatten(1).abs().amax(1, keepdim=True)
            assert (rounded <= largest * (1 / 254 + 1e-6) + 1e-38).all()
            assert ((after.flatten(1).abs().amax(1) - largest[:, 0]).abs() <= largest[:, 0] * 1e-6 + 1e-38).all()
        else:
            assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_any_precision_are_rounded_to_8_bits_as_floats_are(tmp_path, dtype):
    """Formed in bfloat16, 127 times a scale may come out as 128, which is -128 in 8 bits."""
    denoiser = draw_parameters(tiny_denoiser()).to(dtype)
    save_denoiser(denoiser, tmp_path / "eight.safetensors", bits=8)
    for before, after in zip(denoiser.parameters(), load_denoiser(tmp_path / "eight.safetensors").parameters()):
        before = before.float()
        if before.ndim > 1:
            largest = before.flatten(1).abs().amax(1, keepdim=True)
            assert ((after - before).flatten(1).abs() <= largest * (1 / 254 + 1e-6)).all()


@pytest.mark.parametrize("bits", [0, 4, 64, "8", True])
def test_weights_are_stored_in_32_16_or_8_bits(tmp_path, bits):
    with pytest.raises(ValueError, match="32, 16, 8"):
        save_denoiser(tiny_denoiser(), tmp_path / "x.safetensors", bits=bits)


def test_the_file_is_plain_safetensors_that_others_can_read(path):
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(tiny_unet().state_dict())
        assert json.loads(file.metadata()["config"])["network"]["image_size"] == 4
    ordinary = path.with_name("ordinary")
    ordinary.touch()
    assert path.stat().st_mode == ordinary.stat().st_mode


# Whole or not at all


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path, monkeypatch, call):
    before = path.read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, call, fail)
    with pytest.raises(KeyboardInterrupt):
        save_denoiser(tiny_denoiser(predicts="v"), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_the_final_name_appears_only_when_all_is_on_disk(tmp_path, monkeypatch):
    """At the moment of the rename the temporary file is already whole and flushed."""
    calls, replace, fsync = [], os.replace, os.fsync
    target = tmp_path / "model.safetensors"

    def watched(source, destination):
        assert not target.exists()
        read_checkpoint(source, "denoiser")
        calls.append("replace")
        replace(source, destination)

    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(checkpoint.os, "replace", watched)
    save_denoiser(tiny_denoiser(), target)
    assert calls == ["fsync", "replace"]


# Damage: 825 files in all, by accident (756) and by wrong fields under a right checksum (69)


def damaged(whole: bytes, rng: random.Random):
    """189 files: 120 flipped bits, half of them in the header; 50 random cuts; telling cuts; pieces added or lost."""
    end = 8 + int.from_bytes(whole[:8], "little")  # of the header
    for i in range(120):
        place = rng.randrange(end) if i % 2 else rng.randrange(end, len(whole))
        yield whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
    yield from (whole[: rng.randrange(len(whole))] for _ in range(50))
    yield from (whole[:place] for place in (0, 1, 7, 8, 9, end // 2, end - 1, end, end + 1, end + 4, -4, -1))
    yield from (whole + b"\0", whole + whole, b"\0" + whole, whole[end:], whole[1:])
    yield whole[:end] + bytes(len(whole) - end)  # a hole, as a crash of the whole machine leaves
    yield whole[:end] + whole[end + 4 :] + whole[end : end + 4]


def training(**options) -> Trainer:
    options = {"batch_size": 4, "warmup": 0, "precision": "float16"} | options
    return Trainer(tiny_denoiser(classes=2), tiny_images(), torch.arange(10) % 2, **options)


def state(trainer: Trainer) -> dict:
    return {"step": torch.tensor(trainer.step)} | trainer._tensors(trainer.optimiser.state_dict()["state"])


@pytest.fixture(scope="module")
def wholes(tmp_path_factory) -> dict[str, Path]:
    """A small whole file of each kind."""
    folder = tmp_path_factory.mktemp("wholes")
    paths = {name: folder / name for name in ("denoiser", "half", "eight", "training")}
    save_denoiser(tiny_denoiser(), paths["denoiser"])
    save_denoiser(tiny_denoiser(classes=3, patch_size=2, image_size=8), paths["half"], bits=16)
    save_denoiser(tiny_denoiser(classes=3, patch_size=2, image_size=8), paths["eight"], bits=8)
    trainer = training()
    list(trainer.run(2))
    trainer.save(paths["training"])
    return paths


@pytest.mark.parametrize("kind", ["denoiser", "half", "eight", "training"])
def test_no_flipped_bit_and_no_cut_goes_unnoticed(wholes, tmp_path, kind):
    """Always a CheckpointError, and a trainer that was to go on from the file is as it was."""
    bad, trainer = tmp_path / "bad.safetensors", training()
    list(trainer.run(1))
    before = {name: value.clone() for name, value in state(trainer).items()}
    files = list(damaged(wholes[kind].read_bytes(), random.Random(kind)))
    assert len(files) == 189
    for content in files:
        bad.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
            trainer.resume(bad) if kind == "training" else load_denoiser(bad)
    after = state(trainer)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    if kind == "training":
        trainer.resume(wholes[kind])
        assert trainer.step == 2
    else:
        load_denoiser(wholes[kind])


def contents(path) -> tuple[dict, dict, dict]:
    """Header, configuration and tensors of a whole file."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return header, json.loads(header["config"]), tensors


def put(field: str, value):
    """Change one field of the configuration, named like network.groups; the value ... removes it."""

    def change(config, tensors):
        *parents, last = field.split(".")
        for parent in parents:
            config = config[parent]
        assert last in config
        config[last] = value
        if value is ...:
            del config[last]

    return change


def tensor(name: str, make):
    """Change one tensor, or remove it if nothing is made of it."""

    def change(config, tensors):
        value = make(tensors.pop(name))
        tensors |= {} if value is None else {name: value}

    return change


WRONG_MODELS = {
    "no network": put("network", ...),
    "a network in words": put("network", "unet"),
    "no schedule": put("schedule", None),
    "no kind of prediction": put("predicts", ...),
    "a kind of prediction unheard of": put("predicts", "noise"),
    "an option more": lambda config, tensors: config["network"].update(depth=3),
    "no multipliers": put("network.channel_multipliers", ...),
    "more levels": put("network.channel_multipliers", [1, 2, 2]),
    "wider": put("network.base_channels", 8),
    "wider than memory": put("network.base_channels", 1 << 34),
    "wider than numbers": put("network.base_channels", 1 << 80),
    "blocks without end": put("network.blocks_per_level", 10**12),
    "a block more": put("network.blocks_per_level", 2),
    "blocks in words": put("network.blocks_per_level", "1"),
    "half a group": put("network.groups", 0.5),
    "attention nowhere": put("network.attention_resolutions", []),
    "attention at no level": put("network.attention_resolutions", [3]),
    "classes": put("network.classes", 5),
    "heads with norms": put("network.heads", 2),
    "heads that do not share alike": put("network.heads", 3),
    "more classes than memory": put("network.classes", 10**14),
    "other patches": put("network.patch_size", 2),
    "an odd size": put("network.image_size", 5),
    "dropout that is no number": put("network.dropout", float("nan")),
    "T of 0": put("schedule.T", 0),
    "T beyond memory": put("schedule.T", 10**10),
    "T in words": put("schedule.T", "30"),
    "beta of 1": put("schedule.beta_T", 1.0),
    "a schedule unheard of": put("schedule.name", "quadratic"),
    "another schedule's options": put("schedule.name", "cosine"),
    "no tensor": lambda config, tensors: tensors.clear(),
    "a tensor less": tensor("stem.weight", lambda value: None),
    "a tensor more": lambda config, tensors: tensors.update(extra=torch.zeros(1)),
    "a tensor cut": tensor("stem.weight", lambda value: value[:-1]),
    "a tensor turned": tensor("time.linear_1.weight", lambda value: value.T.contiguous()),
    "a tensor flattened": tensor("head.bias", lambda value: value[:, None]),
    "a number that is none": tensor("head.bias", lambda value: value * float("nan")),
    "an infinite number": tensor("stem.weight", lambda value: value.abs().log1p() / 0),
    "whole numbers": tensor("stem.weight", lambda value: value.long()),
}
WRONG_IN_8_BITS = {
    "no scale": tensor("stem.weight.scale", lambda value: None),
    "scales of other outputs": tensor("stem.weight.scale", lambda value: value[:-1]),
    "one scale": tensor("stem.weight.scale", lambda value: value[0].clone()),
    "a scale that is no number": tensor("stem.weight.scale", lambda value: value * float("nan")),
    "a scale too large": tensor("stem.weight.scale", lambda value: value * 1e38 * 1e38),
    "a scale of whole numbers": tensor("stem.weight.scale", lambda value: value.long()),
    "a scale of nothing": lambda config, tensors: tensors.update({"stem.bias.scale": torch.ones(4)}),
    "weights beside their scale": tensor("stem.weight", lambda value: value.float()),
    "8 bits where there is no row": tensor("stem.bias", lambda value: value.to(torch.int8)),
}
WRONG_RUNS = {
    "another model": put("denoiser.predicts", "v"),
    "another batch": put("options.batch_size", 5),
    "no options": put("options", ...),
    "from before there were heads": put("denoiser.network.heads", ...),
    "from before weights decayed": put("options.weight_decay", ...),
    "other data": put("data_sha256", "0" * 64),
    "no step": put("step", ...),
    "a negative step": put("step", -1),
    "half a step": put("step", 1.5),
    "no average": lambda config, tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("ema.")],
    "a moment less": tensor("optimiser.3.exp_avg", lambda value: None),
    "a moment cut": tensor("optimiser.3.exp_avg_sq", lambda value: value[:-1]),
    "a moment that is no number": tensor("optimiser.3.exp_avg", lambda value: value * float("nan")),
    "a moment of no parameter": lambda config, tensors: tensors.update({"optimiser.999.exp_avg": torch.zeros(2)}),
    "a scale less": tensor("scaler.scale", lambda value: None),
    "a part unheard of": lambda config, tensors: tensors.update({"sgd.0": torch.zeros(2)}),
}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("denoiser", change) for change in WRONG_MODELS.values()),
        *(("eight", change) for change in WRONG_IN_8_BITS.values()),
        *(("training", change) for change in WRONG_RUNS.values()),
    ],
    ids=[*WRONG_MODELS, *WRONG_IN_8_BITS, *WRONG_RUNS],
)
def test_wrong_fields_under_a_right_checksum_are_refused(wholes, tmp_path, kind, change):
    """As another program, or an error in this one, would write them."""
    _, config, tensors = contents(wholes[kind])
    change(config, tensors)
    write_checkpoint(tmp_path / "odd", "training" if kind == "training" else "denoiser", config, tensors)
    trainer = training()
    before = {name: value.clone() for name, value in state(trainer).items()}
    with pytest.raises(CheckpointError, match=r"\bodd\b"):
        trainer.resume(tmp_path / "odd") if kind == "training" else load_denoiser(tmp_path / "odd")
    after = state(trainer)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "change",
    [{"kind": ...}, {"config": ...}, {"config": ""}, {"config": "[" * 10_000}, {"config": "7"}],
    ids=["no kind", "no configuration", "an empty one", "a bottomless one", "a number"],
)
def test_a_header_that_lacks_a_part_is_refused(path, tmp_path, change):
    header, _, tensors = contents(path)
    header = {name: value for name, value in (header | change).items() if value is not ...}
    header["sha256"] = checkpoint._digest(header, tensors)
    save_file(tensors, tmp_path / "odd", header)
    with pytest.raises(CheckpointError, match=r"\bodd\b"):
        load_denoiser(tmp_path / "odd")


QUERY, KEY = (f"middle.0.attention.{name}.weight" for name in ("query", "key"))


@pytest.mark.parametrize("names", [{QUERY: KEY, KEY: QUERY}, {QUERY: f"{QUERY}s"}], ids=["exchanged", "renamed"])
def test_the_checksum_covers_names(path, tmp_path, names):
    """All bytes are there, but not under the names they had."""
    header, _, tensors = contents(path)
    save_file({names.get(name, name): tensor for name, tensor in tensors.items()}, tmp_path / "changed", header)
    with pytest.raises(CheckpointError, match="do not match their checksum"):
        load_denoiser(tmp_path / "changed")


def test_a_changed_configuration_is_noticed(path, tmp_path):
    header, _, tensors = contents(path)
    header["config"] = header["config"].replace('"eps"', '"x0"')
    save_file(tensors, tmp_path / "changed", header)
    with pytest.raises(CheckpointError, match="do not match their checksum"):
        load_denoiser(tmp_path / "changed")


# Files of another sort


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*none\.safetensors"):
        load_denoiser(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_denoiser(tmp_path)


def test_another_kind_is_refused(path, tmp_path):
    trainer = Trainer(tiny_denoiser(), tiny_images())
    with pytest.raises(CheckpointError, match="holds a 'denoiser' checkpoint; a 'training' one is needed"):
        trainer.resume(path)
    with pytest.raises(CheckpointError, match="holds a 'classifier' checkpoint; a 'denoiser' or 'training' one is"):
        load_denoiser(shipped("digits-classifier"))


def test_of_a_training_checkpoint_the_averaged_denoiser_is_loaded(tmp_path):
    trainer = Trainer(tiny_denoiser(), tiny_images(), batch_size=4, warmup=0, learning_rate=0.1)
    list(trainer.run(3))
    trainer.save(tmp_path / "training")
    found = load_denoiser(tmp_path / "training").state_dict()
    assert all(torch.equal(value, found[name]) for name, value in trainer.ema.state_dict().items())
    assert not all(torch.equal(value, found[name]) for name, value in trainer.denoiser.state_dict().items())


def test_safetensors_of_others_are_refused(tmp_path):
    for metadata in (None, {"format": "pt"}, {"format": "ddpm_lib 2"}):
        save_file({"a": torch.zeros(2)}, tmp_path / "other", metadata)
        with pytest.raises(CheckpointError, match="not a checkpoint of this library: format"):
            load_denoiser(tmp_path / "other")


class Bomb:
    """Unpickling it leaves a folder behind."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_pickles_are_refused_and_never_run(tmp_path):
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"weight": Bomb(tmp_path / "fired")}))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "torch.pt")
    for name in ("plain.pt", "torch.pt"):
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            load_denoiser(tmp_path / name)
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"network": {"image_size": 4}},
        {"network": {"depth": 3}, "schedule": {}, "predicts": "eps"},
        {"network": tiny_unet().config, "schedule": {"name": "linear", "steps": 3}, "predicts": "eps"},
        {"network": tiny_unet().config, "schedule": {"name": "quadratic"}, "predicts": "eps"},
        {"network": tiny_unet().config, "schedule": {"name": "custom"}, "predicts": "eps"},
        {"network": tiny_unet().config, "schedule": Schedule.linear(30).config, "predicts": "mean"},
        [],
        None,
    ],
    ids=["empty", "no schedule", "network", "schedule", "name of schedule", "custom", "predicts", "list", "null"],
)
def test_a_configuration_that_makes_no_sense_is_refused(tmp_path, config):
    """Whole files, rightly signed, by some other program."""
    write_checkpoint(tmp_path / "odd", "denoiser", config, tiny_unet().state_dict())
    with pytest.raises(CheckpointError, match="odd does not describe a denoiser"):
        load_denoiser(tmp_path / "odd")


@pytest.mark.parametrize("options", [{"base_channels": 8}, {"classes": 3}, {"channel_multipliers": (2, 2)}], ids=str)
def test_weights_of_another_architecture_are_refused(tmp_path, options):
    denoiser = tiny_denoiser()
    other = Denoiser(draw_parameters(tiny_unet(**options)), denoiser.schedule)
    write_checkpoint(tmp_path / "odd", "denoiser", checkpoint.denoiser_config(denoiser), other.network.state_dict())
    with pytest.raises(CheckpointError, match=r"odd does not fit the model: \d+ tensors differ, the first is '"):
        load_denoiser(tmp_path / "odd")


def test_an_unknown_shipped_model_lists_those_there_are():
    with pytest.raises(ValueError, match=r"no model 'cats'; it ships .*digits-classifier"):
        pretrained("cats")


def test_only_networks_that_can_be_built_again_are_saved(tmp_path):
    with pytest.raises(ValueError, match="has a Linear"):
        save_denoiser(Denoiser(torch.nn.Linear(2, 2), Schedule.linear(30)), tmp_path / "x")
    assert not (tmp_path / "x").exists()
