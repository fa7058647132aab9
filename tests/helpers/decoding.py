"""Slow, plain twins of greedy decoding and of the longest common subsequence, for tests of `hf_sharp.evaluation`."""

import torch


def greedy_by_loop(model, prompt, limit, eos):
    ids = list(prompt)
    for _ in range(limit):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def longest_common(a, b):
    """Length of the longest common subsequence, by the textbook recursion."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))
