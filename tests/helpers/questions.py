"""Questions and answers of a few words, and a tokenizer of which each word is a token."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["</s>", "<pad>", "<s>", "who", "wrote", "it", "nobody", "somebody", "did", "Q:", "A:", "user:", "bot:", "be"]


def word_tokenizer(special=None, **settings):
    """One word, one token, with its place in WORDS as its number."""
    tokenizer = Tokenizer(models.WordLevel(dict(zip(WORDS, range(len(WORDS)), strict=True)), unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=special, special_tokens=[("<s>", 2), ("</s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", **settings)


def ids(string):
    return [WORDS.index(word) for word in string.split()]


def examples(count, first=3):
    """Examples that are known by their last token."""
    return [{"input_ids": [first, 4, 5 + i], "labels": [-100, 4, 5 + i]} for i in range(count)]
