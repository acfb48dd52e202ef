"""Tokenizers: load, make, decode, save, fingerprint. Hugging Face fast tokenizers, without importing transformers.

The character tokenizer is what a fresh tiny policy uses; a loaded policy brings its own `tokenizer.json`, and with it the
chat template that `chat.py` fills in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers

from popo_jax.types import UserError

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
VISION = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
"""What stands around an image, for a cell of it, and for one of a video; Qwen's names, which transformers' processor looks up."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that a chat template may call by name."""
TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True, eq=False)
class Tokenizer:
    core: tokenizers.Tokenizer
    eos_ids: tuple[int, ...]
    """Any of these ends a response; the first is the one that training data ends with."""
    pad_id: int
    template: str | None = None
    """Of a chat, in jinja; None: it has none."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Texts of those of `NAMED` that it has."""
    where: str = "the tokenizer"
    """What an error calls it."""

    @property
    def vocab_size(self) -> int:
        return self.core.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """int32 [n]; special: with the tokens that its post-processor puts around a text, such as BOS."""
        return np.array(self.core.encode(text, add_special_tokens=special).ids, np.int32)

    def encode_all(self, texts: Sequence[str], *, special: bool = False) -> list[np.ndarray]:
        return [np.array(e.ids, np.int32) for e in self.core.encode_batch(list(texts), add_special_tokens=special)]

    def decode(self, ids: np.ndarray) -> str:
        """Text of sampled ids, special tokens left out."""
        return self.core.decode([int(i) for i in ids], skip_special_tokens=True)

    def fingerprint(self) -> str:
        """16 hex digits that change with anything that changes ids or where a response ends."""
        identity = json.dumps([self.core.to_str(), self.eos_ids, self.pad_id])
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def save(self, folder: epath.PathLike) -> None:
        """The files that transformers' AutoTokenizer opens."""
        folder = epath.Path(folder)
        token = self.core.id_to_token
        config = dict(self.named) | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": token(self.eos_ids[0]),
            "pad_token": token(self.pad_id),
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        (folder / "tokenizer.json").write_text(self.core.to_str(pretty=True))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
        if self.template is not None:
            (folder / TEMPLATE_FILE).write_text(self.template)


def characters(*, sees: bool = False) -> Tokenizer:
    """One token per printable ASCII character and newline; every other byte is <unk>. sees: and the tokens of images, VISION.

    Byte-level BPE without merges, because transformers gives any tokenizer beside a Qwen2 model that class.
    """
    letters = {"\n": "\u010a", " ": "\u0120"}  # byte-level spelling of what is not visible
    tokens = [PAD, EOS, UNK, *(letters.get(ch, ch) for ch in ["\n", *map(chr, range(32, 127))])]
    tokens += VISION if sees else ()
    core = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([PAD, EOS, UNK, *(VISION if sees else ())])
    return Tokenizer(core, (tokens.index(EOS),), tokens.index(PAD))


def load(folder: epath.PathLike) -> Tokenizer:
    """The tokenizer of a checkpoint folder. End tokens: generation_config.json, else config.json, else tokenizer_config.json.

    The chat template, if there is one: chat_template.jinja, else `chat_template` in tokenizer_config.json, else in
    chat_template.json. Errors: UserError if a file is missing or broken, or no end token is named.
    """
    folder = epath.Path(folder)
    path = folder / "tokenizer.json"
    try:
        core = tokenizers.Tokenizer.from_str(path.read_text())
    except Exception as e:  # tokenizers raises bare Exception
        raise UserError(f"{path} must be a fast tokenizer's file: {str(e).splitlines()[0]}") from e
    core.no_truncation()  # what a file may have on; a prompt is neither cut nor padded
    core.no_padding()
    settings = [_json(folder / name) for name in ("generation_config.json", "config.json", "tokenizer_config.json")]
    found = next((s["eos_token_id"] for s in settings if s.get("eos_token_id") is not None), None)
    if found is None:
        found = _token_id(core, settings[2].get("eos_token"))
    if found is None:
        raise UserError(f"{folder} names no end token in generation_config.json, config.json or tokenizer_config.json")
    size, eos_ids = core.get_vocab_size(with_added_tokens=True), tuple(found) if isinstance(found, list) else (found,)
    if not eos_ids or not all(type(i) is int and 0 <= i < size for i in eos_ids):
        raise UserError(f"{folder}: eos_token_id must name ids from 0 to {size - 1} of its tokenizer, got {found!r}")
    named = _named(folder, settings[2])
    pad = _token_id(core, named.get("pad_token"))
    pad_id = eos_ids[0] if pad is None else pad
    return Tokenizer(core, eos_ids, pad_id, _template(folder, settings[2]), named, str(folder))


def _template(folder: epath.Path, config: Mapping[str, object]) -> str | None:
    """Of several, the one named default."""
    try:
        if (folder / TEMPLATE_FILE).exists():
            return (folder / TEMPLATE_FILE).read_bytes().decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{folder / TEMPLATE_FILE} must be text in UTF-8: {e}") from e
    for name, settings in (("tokenizer_config.json", config), ("chat_template.json", _json(folder / "chat_template.json"))):
        found = settings.get("chat_template")
        if isinstance(found, list):
            found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}.get("default")
        if isinstance(found, str):
            return found
        if found is not None:
            raise UserError(f"{folder / name}: chat_template must be text, or a list of name and template, got {found!r:.80}")
    return None


def _named(folder: epath.Path, config: Mapping[str, object]) -> dict[str, str]:
    if "added_tokens_decoder" not in config:  # of older folders, where the other file wins, as with transformers
        config = {**config, **_json(folder / "special_tokens_map.json")}
    texts = {name: _content(config.get(name)) for name in NAMED}
    return {name: text for name, text in texts.items() if text is not None}


def _json(path: epath.Path) -> dict:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} must be JSON: {e}") from e
    return data if isinstance(data, dict) else {}


def _token_id(core: tokenizers.Tokenizer, token: object) -> int | None:
    text = _content(token)
    return core.token_to_id(text) if text is not None else None


def _content(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
