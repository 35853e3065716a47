"""Tokenizers of a few tokens and tokenised sets made of them, for the tests of what is shown."""

import re
import types

import numpy as np
import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jax_sft.data.conversation import Account, Sequence
from jax_sft.data.dataset import TokenizedSet
from jax_sft.data.loader import Loader


def byte_level():
    """Every byte is a token, so 汉 is three and 🙂 four; "ab" is one merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("    ", normalized=False)])
    return types.SimpleNamespace(backend_tokenizer=tokenizer)


def sentence_piece():
    """Llama 2's kind: ▁ for a blank, bytes for what is not in the vocabulary, the first blank stripped."""
    tokens = ["<s>", "</s>", "▁Hi", "▁you", ".", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return types.SimpleNamespace(backend_tokenizer=tokenizer)


def ids_of(tokenizer, text):
    """Ids of a text; ⟨im_end⟩ stands for the control token, <|im_end|> for the letters."""
    ids = []
    for part in re.split("(⟨im_start⟩|⟨im_end⟩)", text):
        if part.startswith("⟨"):
            ids.append(tokenizer.backend_tokenizer.token_to_id(f"<|{part[1:-1]}|>"))
        else:
            alone = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            alone.encode_special_tokens = True
            ids += alone.encode(part).ids
    return ids


def sequence_of(ids, weights, *, source="chat", where="x.jsonl:1"):
    """`weights[i]` is the weight of predicting `ids[i]`."""
    return Sequence(
        np.asarray(ids[:-1], np.int32),
        np.asarray(ids[1:], np.int32),
        np.asarray(weights[1:], np.float32),
        source,
        where,
    )


def make_set(sequences, account=None):
    sources = tuple(dict.fromkeys(s.source for s in sequences))
    lengths_N = np.asarray([len(s.tokens_T) for s in sequences], np.int32)
    return TokenizedSet(
        tokens_M=np.concatenate([s.tokens_T for s in sequences]),
        targets_M=np.concatenate([s.targets_T for s in sequences]),
        weights_M=np.concatenate([s.weights_T for s in sequences]),
        offsets_N1=np.concatenate([[0], np.cumsum(lengths_N)]),
        lengths_N=lengths_N,
        trained_N=np.asarray([(s.weights_T > 0).sum() for s in sequences], np.int32),
        sources=sources,
        source_ids_N=np.asarray([sources.index(s.source) for s in sequences], np.int32),
        ids=[s.id for s in sequences],  # type: ignore[arg-type]
        account=account or Account(read=len(sequences), kept=len(sequences)),
        fingerprint="f00d",
    )


def drawn_set(counts):
    """A set from (length, trained) of each sequence."""
    return make_set([sequence_of([7] * (n + 1), [0.0] * (n + 1 - trained) + [1.0] * trained) for n, trained in counts])


def make_loader(dataset, *, batch_size=4, max_length=64):
    return Loader(
        dataset,
        batch_size=batch_size,
        max_length=max_length,
        packing=True,
        sources=dataset.sources,
        seed=0,
    )


def example():
    """Two sequences: a trained answer with control text in the question, and one of weight 0.5."""
    tokenizer = byte_level()
    sequences = []
    for question, answer, weight in [("Say <|im_end|>\n", "汉字🙂\nab", 1.0), ("<b>&\x1b[31m\u202e", "ok", 0.5)]:
        read, trained = ids_of(tokenizer, f"⟨im_start⟩{question}"), ids_of(tokenizer, f"{answer}⟨im_end⟩\n")
        weights = [0.0] * len(read) + [weight] * len(trained)
        sequences.append(sequence_of(read + trained, weights, source=f"s{weight}"))
    return make_set(sequences), tokenizer
