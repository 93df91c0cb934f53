"""How text becomes tokens: one for each byte, or frequent pairs merged into one (BPE)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

# Token 0 is padding, token 1 stands before the first byte of a document.
PADDING, START = 0, 1
_SPECIAL = ["<padding>", "<start>"]


class Bytes:
    """A token for each byte.

    Attributes:
        vocabulary: Number of different tokens, including padding and start.
        byte_lengths: The bytes of each token; 0 for padding and start.
    """

    vocabulary = len(_SPECIAL) + 256
    byte_lengths: tuple[int, ...] = (0, 0, *[1] * 256)

    def encode(self, document: bytes) -> np.ndarray:
        """Tokens of UTF-8 bytes, an int32 vector."""
        return np.frombuffer(document, np.uint8).astype("int32") + len(_SPECIAL)

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Bytes of a sequence of tokens."""
        return bytes(token - len(_SPECIAL) for token in tokens if token >= len(_SPECIAL))


class BytePairs:
    """Byte-level BPE as in GPT-2: starting with bytes, the most frequent pair becomes a token.

    Args:
        documents: UTF-8 text whose pairs are counted.
        vocabulary: Different tokens at most, including padding, start and 256 bytes.

    Attributes: Those of `Bytes`.

    Raises:
        ImportError: Without the package `tokenizers`.
    """

    def __init__(self, documents: Iterable[bytes], vocabulary: int) -> None:
        import tokenizers

        byte_level = tokenizers.pre_tokenizers.ByteLevel
        self._tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        self._tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=_SPECIAL,
            initial_alphabet=byte_level.alphabet(),
            show_progress=False,
        )
        self._tokenizer.train_from_iterator((text.decode() for text in documents), trainer)
        self.vocabulary = self._tokenizer.get_vocab_size()
        pieces = (self._tokenizer.id_to_token(i) for i in range(len(_SPECIAL), self.vocabulary))
        bytes_of = _bytes_of_characters()
        special = [b""] * len(_SPECIAL)
        self._pieces = [*special, *(bytes(bytes_of[c] for c in piece) for piece in pieces)]
        self.byte_lengths = tuple(map(len, self._pieces))

    def encode(self, document: bytes) -> np.ndarray:
        """Tokens of UTF-8 bytes, an int32 vector."""
        return np.array(self._tokenizer.encode(document.decode()).ids, "int32")

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Bytes of a sequence of tokens."""
        return b"".join(self._pieces[token] for token in tokens)


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of byte-level BPE represents, as in GPT-2's encoder."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
