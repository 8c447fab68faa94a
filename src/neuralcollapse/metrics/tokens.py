"""Batches of causal language models: next tokens as targets, and a warning about targets that are not shifted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # in the labels of transformers
Unpack = Callable[[Any], tuple[Any, Tensor | None]]


def next_tokens(batch: Any, ignore_index: int = IGNORED) -> tuple[Any, Tensor]:
    """Return the inputs of a causal language model, and the next token at each position as its target.

    The target at position t is the label at t + 1, or the token at t + 1 if there are no labels. A position has no
    target if it is the last one, if it or the next position is padding, or if the next label is −100.

    Args:
        batch: Tokens (B, T); or a mapping with ``input_ids``, and possibly ``attention_mask`` and ``labels``, of the
            same shape. Labels are aligned with the tokens (not shifted), as in transformers.
        ignore_index: Value that marks positions without a target.

    Raises:
        ValueError: if the batch has other contents, or its labels are already shifted.

    Examples:
        >>> next_tokens(torch.tensor([[5, 6, 7]]))[1]
        tensor([[   6,    7, -100]])
    """
    if not isinstance(batch, Tensor | Mapping):
        raise ValueError(f"loader must yield token ids or mappings with input_ids, got {type(batch).__name__}")
    mapping = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    tokens, mask, labels = mapping.get("input_ids"), mapping.get("attention_mask"), mapping.pop("labels", None)
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
        got = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"input_ids must be integers of shape (B, T) for unpack='next_token', got {got}")
    for name, values in (("attention_mask", mask), ("labels", labels)):
        if isinstance(values, Tensor) and values.shape != tokens.shape:
            raise ValueError(
                f"{name} must be of the shape of input_ids, {tuple(tokens.shape)}, got {tuple(values.shape)}"
            )
    labels = tokens if labels is None else labels.to(tokens.device)
    _check_unshifted(tokens, labels)
    targets = torch.full_like(labels, ignore_index, dtype=torch.int64)
    following = labels[:, 1:].long()
    counted = following != IGNORED
    if mask is not None:
        present = mask.to(tokens.device).bool()
        counted = counted & present[:, 1:] & present[:, :-1]
    targets[:, :-1] = torch.where(counted, following, ignore_index)
    return batch if isinstance(batch, Tensor) else mapping, targets


def warning_of_unshifted(unpack: Unpack, ignore_index: int | None) -> Unpack:
    """Return the function with a check that warns if the targets of the first batch are its input tokens.

    Args:
        unpack: Function of a batch that returns inputs and targets.
        ignore_index: Target of samples that are left out, or None.
    """
    first = True

    def checked(batch: Any) -> tuple[Any, Tensor | None]:
        nonlocal first
        unpacked = unpack(batch)
        if first and isinstance(unpacked, tuple | list) and len(unpacked) == 2:
            first = False
            if any(_are_tokens(unpacked[1], tokens, ignore_index) for tokens in _tensors(unpacked[0])):
                warnings.warn(
                    "targets equal the input tokens at the same positions, but a causal language model predicts the "
                    "next token; unpack='next_token' shifts the targets",
                    UserWarning,
                    stacklevel=2,
                )
        return unpacked

    return checked


def _check_unshifted(tokens: Tensor, labels: Tensor) -> None:
    """Raise if each label equals the next token, and some label differs from the token at its position."""
    counted = labels[:, :-1] != IGNORED
    shifted = (labels[:, :-1] == tokens[:, 1:]) | ~counted
    same = (labels == tokens) | (labels == IGNORED)
    if bool(counted.any() and shifted.all() and not same.all()):
        raise ValueError(
            "labels must not be shifted for unpack='next_token', but each label equals the next input token: "
            "leave them out of the batch, or give unpack=lambda batch: (inputs, targets)"
        )


def _are_tokens(targets: Any, tokens: Tensor, ignore_index: int | None) -> bool:
    """Return whether targets (B, T) equal the tokens at every position that is not ignored."""
    if not isinstance(targets, Tensor) or targets.ndim < 2 or targets.shape != tokens.shape or targets.shape[1] < 2:
        return False
    if targets.is_floating_point() or tokens.is_floating_point() or torch.bool in (targets.dtype, tokens.dtype):
        return False
    counted = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
    same = targets == tokens.to(targets.device)
    return bool(counted.any() and (same | ~counted).all() and targets[counted].unique().numel() > 1)


def _tensors(inputs: Any) -> Iterator[Tensor]:
    values = (
        inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else [inputs]
    )
    yield from (value for value in values if isinstance(value, Tensor))
