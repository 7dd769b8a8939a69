"""From a caption to features of its words, and a U-Net that draws what the caption says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .schedule import _positive_int
from .unet import UNet

HEADS = 4  # of every layer of the encoder


def in_words(caption: str) -> list[str]:
    """The words of a caption in small letters, each comma one of them."""
    return caption.lower().replace(",", " , ").split()


class TextEncoder(nn.Module):
    """A small transformer that reads captions of known words.

    A caption becomes ``length`` tokens: words by their place in the vocabulary, counted from 1, then zeros. Each token
    gives ``width`` features.

    Args:
        vocabulary: the words, in lower case; a comma may be one.
        length: of the longest caption, in words.
        width: features of a word, a multiple of 4.
        layers: of self-attention; 0 gives every word the same features wherever it stands but for its place.

    Source: Vaswani et al. (2017), with normalisation before each part (Xiong et al. 2020).
    """

    def __init__(self, vocabulary: Sequence[str], length: int, width: int = 64, layers: int = 2):
        super().__init__()
        if len(set(vocabulary)) != len(vocabulary) or not vocabulary:
            raise ValueError(f"the vocabulary must hold one or more words, each once; got {len(vocabulary)} words.")
        if _positive_int("width", width) % HEADS:
            raise ValueError(f"width must be a multiple of {HEADS}; got {width}.")
        self.config = {"vocabulary": list(vocabulary), "length": length, "width": width, "layers": layers}
        self.number = {word: i for i, word in enumerate(vocabulary, start=1)}
        self.length, self.width = _positive_int("length", length), width
        self.words = nn.Embedding(len(vocabulary) + 1, width)
        self.places = nn.Parameter(torch.empty(length, width))
        for table in (self.words.weight, self.places):  # alike, so that places count as much as words
            nn.init.normal_(table, std=0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, HEADS, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def tokenise(self, captions: Sequence[str]) -> Tensor:
        """Tokens (B, length) of captions; commas count as words, capital letters as small ones.

        Raises:
            ValueError: a word is not in the vocabulary, or a caption is too long.
        """
        tokens = torch.zeros(len(captions), self.length, dtype=torch.long)
        for row, caption in zip(tokens, captions):
            words = in_words(caption)
            if len(words) > self.length:
                raise ValueError(f"a caption may have {self.length} words; {caption!r} has {len(words)}.")
            for i, word in enumerate(words):
                if word not in self.number:
                    raise ValueError(f"{word!r} is not among the words this encoder knows: {', '.join(self.number)}.")
                row[i] = self.number[word]
        return tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """Features (B, length, width) of tokens (B, length)."""
        h = self.words(tokens) + self.places
        for layer in self.layers:
            h = layer(h)
        return self.norm(h)


class PretrainedEncoder(nn.Module):
    """A text encoder from the Hugging Face library ``transformers``, with its tokeniser, frozen.

    Takes the place of a ``TextEncoder``: a CLIP text model, a T5 encoder or a BERT, as Stable Diffusion and Imagen use.
    Its weights stay where they are, in safetensors: a checkpoint of a network with it holds its name only.

    Args:
        name: a folder with model and tokeniser, or a name on the Hugging Face hub, which is downloaded.
        length: of the longest caption, in the tokeniser's own tokens; longer ones are cut.

    Raises:
        ImportError: transformers is not installed.
    """

    def __init__(self, name: str, length: int = 77):
        super().__init__()
        try:
            from transformers import AutoConfig, AutoModel, AutoTokenizer
        except ImportError as error:
            raise ImportError("PretrainedEncoder needs one more package: pip install transformers") from error
        self.config = {"name": str(name), "length": length}
        self.length = _positive_int("length", length)
        self.tokeniser = AutoTokenizer.from_pretrained(name)
        whole = AutoModel.from_pretrained(name, config=AutoConfig.from_pretrained(name), use_safetensors=True)
        model = getattr(whole, "text_model", None) or getattr(whole, "encoder", None)
        has_both = getattr(whole.config, "is_encoder_decoder", False) or hasattr(whole, "text_model")
        model = (model if has_both else whole).eval().requires_grad_(False)
        self.unsaved = [model]  # in a list, so that no checkpoint holds its weights
        self.width = model.config.hidden_size

    def __deepcopy__(self, memo: dict) -> PretrainedEncoder:
        return self  # it never changes

    def tokenise(self, captions: Sequence[str]) -> Tensor:
        """Token numbers (B, length), filled up with the tokeniser's padding."""
        options = {"padding": "max_length", "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        return self.tokeniser(list(captions), **options)["input_ids"]

    def forward(self, tokens: Tensor) -> Tensor:
        """Features (B, length, width) of tokens (B, length)."""
        padding, end = self.tokeniser.pad_token_id, self.tokeniser.eos_token_id
        mask = None if padding == end else (tokens != padding).long()  # CLIP fills up with its mark of the end
        return self.unsaved[0].to(tokens.device)(input_ids=tokens, attention_mask=mask).last_hidden_state


class TextUNet(nn.Module):
    """A U-Net with its text encoder: the condition is the tokens of captions, ``encoder.tokenise([...])``.

    Args:
        encoder: TextEncoder or PretrainedEncoder, trained before; it stays as it is while the U-Net learns.
        unet: with text_channels = encoder.width.
    """

    def __init__(self, encoder: TextEncoder | PretrainedEncoder, unet: UNet):
        super().__init__()
        if unet.config["text_channels"] != encoder.width:
            raise ValueError(
                f"the encoder gives {encoder.width} features per word, so the U-Net must have text_channels = "
                f"{encoder.width}; got {unet.config['text_channels']}."
            )
        self.encoder, self.unet = encoder.requires_grad_(False), unet
        self.config = unet.config | {"encoder": encoder.config}

    @property
    def nothing(self) -> Tensor:
        """The tokens (length,) of the empty caption, which stands for no condition."""
        return self.encoder.tokenise([""])[0]

    def forward(self, x: Tensor, steps: Tensor, condition: Tensor | None = None) -> Tensor:
        """Output of the shape of x, for steps (B,) counted from 0 and tokens (B, length); None is the empty caption."""
        if condition is None:
            condition = self.nothing.to(x.device).expand(len(x), -1)
        return self.unet(x, steps, self.encoder(condition).to(x.dtype))
