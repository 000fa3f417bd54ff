"""The small model's tokenizer is a byte-level BPE of about a thousand pieces in which every digit is its own token."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
HELD_BACK = "asyncio/*.py"
EVALUATION_TEXT = "pydoc_data"  # the demo's text: it must not be seen, not even by the tokenizer


def stdlib_text(limit: int = 4_000_000, modules: str = "*.py") -> Iterator[str]:
    """Yield source of the standard library, up to `limit` characters and the end of a file.

    modules: a pattern; those at the top are for tokenizer and training, `HELD_BACK` for evaluation.
    """
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob(modules)):
        if limit > 0 and EVALUATION_TEXT not in str(path):
            text = path.read_text(encoding="utf-8", errors="replace")
            limit -= len(text)
            yield text


def train_tokenizer(texts: Iterable[str], size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a tokenizer on `texts`; its encoding with special tokens puts `<s>` in front and nothing behind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
