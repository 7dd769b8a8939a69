"""The text encoder, and the U-Net that draws what a caption says."""

import re

import pytest
import torch
from torch import nn

from ddpm_lib import CheckpointError, Denoiser, Guided, Schedule, Trainer, UNet, load_denoiser, sample, save_denoiser
from ddpm_lib.checkpoint import MODELS, denoiser_config, load_text_encoder, save_text_encoder, write_checkpoint
from ddpm_lib.scenes import COLOURS, LONGEST, SHAPE_WORDS, SHAPES, Item, Scene, captioned_scenes
from ddpm_lib.text import PretrainedEncoder, TextEncoder, TextUNet
from ddpm_lib.unet import CrossAttention
from scripts.text_encoder import described

WORDS = ("a", "red", "blue", "circle", "square", "above", ",")


def encoder(**options) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(WORDS, length=6, **{"width": 8, "layers": 1} | options)


def unet(**options) -> UNet:
    return UNet(8, 3, 8, (1, 2), 1, (4,), dropout=0.0, groups=4, **options)


def denoiser() -> Denoiser:
    network = TextUNet(encoder(), unet(text_channels=8))
    torch.manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Denoiser(network, Schedule.linear(50), "v")


CAPTIONS = ["a red circle above a square", "a blue square above a circle"]


def test_words_become_their_places_and_the_rest_is_zero():
    tokens = encoder().tokenise(["A red, circle", ""])
    assert tokens.tolist() == [[1, 2, 7, 4, 0, 0], [0] * 6]


@pytest.mark.parametrize(
    ("caption", "says"),
    [("a green circle", "'green' is not among the words"), ("a red circle above a red circle", "may have 6 words")],
)
def test_what_the_encoder_cannot_read_is_refused(caption, says):
    with pytest.raises(ValueError, match=says):
        encoder().tokenise([caption])


def test_the_order_of_words_matters():
    reader = encoder().eval()
    one, other = reader(reader.tokenise(["a red circle above a square", "a square above a red circle"]))
    assert (one.mean(0) - other.mean(0)).abs().max() > 1e-3


def test_attention_to_words_is_that_of_torch():
    """The same as nn.MultiheadAttention with these weights."""
    torch.manual_seed(0)
    ours, theirs = CrossAttention(8, 6, groups=4), nn.MultiheadAttention(8, 4, kdim=6, vdim=6, batch_first=True)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(ours.query.weight[:, :, 0, 0])
        theirs.k_proj_weight.copy_(ours.key.weight)
        theirs.v_proj_weight.copy_(ours.value.weight)
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.weight.copy_(ours.out.weight[:, :, 0, 0])
        theirs.out_proj.bias.copy_(ours.out.bias)
        x, text = torch.randn(2, 8, 4, 3), torch.randn(2, 5, 6)
        seen, weights = theirs(ours.norm(x).flatten(2).transpose(1, 2), text, text)
        torch.testing.assert_close(ours(x, text), x + seen.transpose(1, 2).view(x.shape))
        torch.testing.assert_close(ours.weights(x, text).flatten(1, 2), weights)


def test_no_caption_is_the_empty_one_and_captions_differ():
    model, x = denoiser(), torch.randn(2, 3, 8, 8)
    tokens = model.network.encoder.tokenise
    with torch.no_grad():
        assert torch.equal(model(x, 5).v, model(x, 5, tokens(["", ""])).v)
        assert (model(x, 5, tokens(CAPTIONS)).v - model(x, 5, tokens(CAPTIONS[::-1])).v).abs().max() > 1e-3


def test_captions_are_sampled_with_guidance_like_classes():
    model = denoiser()
    tokens = model.network.encoder.tokenise(CAPTIONS)
    options = {"shape": (2, 3, 8, 8), "steps": 4, "condition": tokens}
    one, other = (sample(Guided(model, w), generator=torch.Generator().manual_seed(0), **options) for w in (0.0, 2.0))
    assert (one - other).abs().max() > 0.01


def test_the_encoder_stays_as_it_is_while_the_unet_learns_and_a_resumed_run_has_the_same_bits(tmp_path):
    model = denoiser()
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    options = {"batch_size": 4, "warmup": 1, "precision": "float32", "condition_dropout": 0.5}
    tokens = model.network.encoder.tokenise(CAPTIONS * 2)
    trainer = Trainer(model, images, tokens, **options)
    list(trainer.run(2))
    trainer.save(tmp_path / "run.safetensors")
    list(trainer.run(2))
    after = model.network.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"unet"}
    again = Trainer(denoiser(), images, tokens, **options)
    again.resume(tmp_path / "run.safetensors")
    list(again.run(2))
    assert all(torch.equal(value, again.denoiser.network.state_dict()[name]) for name, value in after.items())


def test_a_share_of_captions_is_left_out(monkeypatch):
    seen, model = [], denoiser()
    forward = TextUNet.forward
    monkeypatch.setattr(TextUNet, "forward", lambda self, x, t, c=None: seen.append(c) or forward(self, x, t, c))
    tokens = model.network.encoder.tokenise(CAPTIONS[:1] * 100)
    trainer = Trainer(model, torch.zeros(100, 3, 8, 8), tokens, batch_size=100, condition_dropout=0.25)
    list(trainer.run(4))
    empty = (torch.cat(seen) == 0).all(1)
    assert 70 <= int(empty.sum()) <= 130
    assert torch.equal(torch.cat(seen)[~empty], tokens[:1].expand(int((~empty).sum()), -1))


def test_a_saved_model_reads_and_draws_as_before(tmp_path):
    model = denoiser().eval()
    save_denoiser(model, tmp_path / "model.safetensors")
    again = load_denoiser(tmp_path / "model.safetensors")
    x, tokens = torch.randn(2, 3, 8, 8), again.network.encoder.tokenise(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(model(x, 7, tokens).v, again(x, 7, tokens).v)


def test_a_saved_encoder_reads_as_before_and_a_damaged_one_is_refused(tmp_path):
    path, reader = tmp_path / "encoder.safetensors", encoder()
    save_text_encoder(reader, path)
    tokens = reader.tokenise(CAPTIONS)
    torch.testing.assert_close(load_text_encoder(path)(tokens), reader.eval()(tokens), rtol=0, atol=1e-5)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError):
        load_text_encoder(path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TextUNet(encoder(), unet(text_channels=4)), "the U-Net must have text_channels = 8; got 4"),
        (lambda: TextEncoder(("a", "a"), 4), "each once"),
        (lambda: encoder(width=6), "multiple of 4; got 6"),
        (lambda: unet(text_channels=8, classes=3), "in one way; got classes and text_channels"),
        (lambda: unet(text_channels=8)(torch.zeros(1, 3, 8, 8), torch.zeros(1)), "needs a text"),
        (lambda: unet(image_channels=1)(torch.zeros(1, 3, 8, 8), torch.zeros(1)), "needs an image beside x"),
        (lambda: Trainer(denoiser(), torch.zeros(2, 3, 8, 8), torch.zeros(2)), "captions must come as tokens"),
    ],
)
def test_what_does_not_fit_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(("field", "value"), [("layers", 10**9), ("layers", "two"), ("width", 6), ("vocabulary", [])])
def test_an_encoder_with_a_wrong_field_is_refused(field, value, tmp_path):
    reader = encoder()
    write_checkpoint(tmp_path / "e.safetensors", "text encoder", reader.config | {field: value}, reader.state_dict())
    with pytest.raises(CheckpointError, match="does not describe a text encoder"):
        load_text_encoder(tmp_path / "e.safetensors")


def test_a_model_whose_encoder_is_no_encoder_is_refused(tmp_path):
    model = denoiser()
    save_denoiser(model, tmp_path / "m.safetensors")
    config = denoiser_config(model)
    config["network"] = config["network"] | {"encoder": 5}
    write_checkpoint(tmp_path / "m.safetensors", "denoiser", config, model.network.state_dict())
    with pytest.raises(CheckpointError, match="no network of this library"):
        load_denoiser(tmp_path / "m.safetensors")


def test_an_image_beside_the_noisy_one_reaches_the_output():
    torch.manual_seed(0)
    network = unet(image_channels=1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, beside = torch.randn(2, 3, 8, 8), torch.randn(2, 1, 8, 8)
    steps = torch.zeros(2, dtype=torch.long)
    assert (network(x, steps, beside) - network(x, steps, beside.flip(0))).abs().max() > 1e-2


def test_a_function_makes_the_images_beside_from_those_of_the_batch():
    seen = []

    def grey(x0):
        seen.append(x0)
        return x0.mean(1, keepdim=True)

    model = Denoiser(unet(image_channels=1), Schedule.linear(50))
    trainer = Trainer(model, torch.rand(4, 3, 8, 8), grey, batch_size=4, flip=True)
    list(trainer.run(2))
    assert [tuple(x0.shape) for x0 in seen] == [(4, 3, 8, 8)] * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP text model, a T5 and a BERT, tiny and random, with a tokeniser, as transformers stores them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BertConfig,
        BertModel,
        CLIPTextConfig,
        CLIPTextModel,
        PreTrainedTokenizerFast,
        T5Config,
        T5Model,
    )

    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokeniser = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    small = {"vocab_size": len(vocabulary), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPTextConfig(max_position_embeddings=8, **sizes, **small)
    bert = BertConfig(max_position_embeddings=8, **sizes, **small)
    t5 = T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0, **small)
    place = tmp_path_factory.mktemp("transformers")
    for name, model in (("clip", CLIPTextModel(clip)), ("t5", T5Model(t5)), ("bert", BertModel(bert))):
        model.save_pretrained(place / name)
        tokeniser.save_pretrained(place / name)
    return place


@pytest.mark.parametrize("name", ["clip", "t5", "bert"])
def test_an_encoder_of_transformers_takes_the_place_of_ours(folder, name, tmp_path):
    reader = PretrainedEncoder(folder / name, length=8)
    assert (reader.width, reader.length) == (16, 8)
    tokens = reader.tokenise(CAPTIONS)
    assert tokens.tolist()[0] == [2, 3, 5, 7, 2, 6, 0, 0]
    model = Denoiser(TextUNet(reader, unet(text_channels=16)), Schedule.linear(50))
    images = torch.rand(4, 3, 8, 8)
    trainer = Trainer(model, images, reader.tokenise(CAPTIONS * 2), batch_size=4)
    list(trainer.run(2))
    path = tmp_path / "model.safetensors"
    save_denoiser(trainer.ema, path)
    again, x = load_denoiser(path), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(trainer.ema(x, 7, tokens).eps, again(x, 7, tokens).eps)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        assert not any(key.startswith("encoder") for key in file.keys())


def test_the_unet_takes_the_features_of_an_encoder_in_half_precision_in_its_own(folder, tmp_path):
    from transformers import AutoTokenizer, BertModel

    BertModel.from_pretrained(folder / "bert").half().save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(folder / "bert").save_pretrained(tmp_path / "half")
    reader = PretrainedEncoder(tmp_path / "half", length=8)
    tokens, x = reader.tokenise(CAPTIONS), torch.randn(2, 3, 8, 8)
    network = TextUNet(reader, unet(text_channels=16))
    for dtype in (torch.float32, torch.float16, torch.float64):
        network.unet.to(dtype)
        assert network(x.to(dtype), torch.tensor([3, 4]), tokens).dtype == dtype


@pytest.mark.parametrize("name", ["clip", "t5", "bert"])
def test_the_words_of_an_encoder_of_transformers_do_not_see_the_padding(folder, name):
    short, long = (PretrainedEncoder(folder / name, length=length) for length in (6, 8))
    with torch.no_grad():
        features = short(short.tokenise(CAPTIONS[:1])), long(long.tokenise(CAPTIONS[:1]))
    words = int((short.tokenise(CAPTIONS[:1]) > 0).sum())
    torch.testing.assert_close(features[0][:, :words], features[1][:, :words], rtol=0, atol=1e-5)


def test_a_word_describes_the_object_it_belongs_to():
    circle, box = Item("circle", "red", "small", 16.0, 8.0), Item("square", "blue", "large", 16.0, 22.0)
    scene = Scene("navy", (circle, box), "top to bottom")
    rows = torch.tensor(described(scene, "on navy, a big blue box below a red disc"))
    assert rows.shape == (LONGEST, 6 + 8 + 2 + 6 + 4 + 2 + 4)
    assert set(rows.flatten().tolist()) == {0, 1}
    whole = [22 + 1, 26 + 0, 28 + 1]  # navy, from top to bottom, two
    first, second = [0, 6 + 0, 14 + 0, 16 + 0], [1, 6 + 4, 14 + 1, 16 + 2]
    for row, told in enumerate([second] * 7 + [first] * 4 + [[]] * (LONGEST - 11)):
        assert rows[row].nonzero().flatten().tolist() == told + whole

    balls = Scene("black", (circle,) * 3)  # equal objects have no order, so no places
    row = torch.tensor(described(balls, "three red circles"))[1]
    assert row.nonzero().flatten().tolist() == [0, 6 + 0, 14 + 0, 22 + 0, 28 + 2]
    three = Scene("black", (circle, box, Item("ring", "pink", "small", 16.0, 30.0)), "left to right")
    row = torch.tensor(described(three, "from right to left, a pink ring, a blue square and a red circle"))[9]
    assert row.nonzero().flatten().tolist() == [1, 6 + 4, 14 + 1, 16 + 4, 22 + 0, 26 + 1, 28 + 2]


def test_the_shipped_encoder_has_read_what_its_card_says():
    """Each of the words 'red circle' tells shape, colour and place of its object, in the numbers for them."""
    encoder = load_text_encoder("scenes-text")
    off, wrong = [], []
    for split in ("test", "held-out pairs", "held-out objects"):
        made = captioned_scenes(800, split, seed=3, family="pairs")
        with torch.no_grad():
            tokens = encoder.tokenise([caption for _, caption in made])
            features = torch.cat([encoder(part) for part in tokens.split(400)])
        errors = []
        for (scene, caption), feature in zip(made, features):
            words = caption.replace(",", " ,").split()
            for place, item in enumerate(scene.items):
                end = next(
                    i
                    for i in range(1, len(words))
                    if words[i - 1] == item.colour and words[i] in SHAPE_WORDS[item.shape]
                )
                told = torch.zeros(22)
                told[list(SHAPES).index(item.shape)] = told[6 + list(COLOURS).index(item.colour)] = 1
                told[16 + 2 * place + 3 * (scene.order == "left to right")] = 1
                difference = feature[end - 1 : end + 1, :22] - told
                errors.append(difference[:, [*range(14), *range(16, 22)]])
        errors = torch.cat(errors)
        assert len(errors) == 4 * 800
        off.append(float(errors.square().mean().sqrt()))
        wrong.append(int((errors.abs().amax(1) > 0.5).sum()))
    card = (MODELS / "scenes-text.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:test|held-out \w+) \| ([\d.]+) \| (\d+) \|$", card, re.MULTILINE)
    assert off == pytest.approx([float(error) for error, _ in rows], abs=0.0015)
    assert wrong == pytest.approx([int(number) for _, number in rows], abs=2)
